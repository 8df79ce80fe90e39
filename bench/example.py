"""Runs llama-cpp-python's example server, `examples/server/server.py` of its sdist, on the library of Paceline.

The server's further dependencies are installed into a separate folder. An empty module replaces `llama_cpp.mtmd_cpp`,
the library's part for images: the server imports that module, but it is not built here.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from bench.models import SetupError, run_pip
from bench.peers import PEERS, Settings, pinned, sources
from bench.server import HOST, Server, free_port, running

# The name of the example server among the contenders.
EXAMPLE = "llama-cpp-python"

REQUIREMENTS = ("fastapi>=0.115,<1", "uvicorn>=0.40,<1", "pydantic>=2,<3", "jinja2>=3,<4", "openai>=3,<4")

LAUNCH = """
import runpy, sys, types, llama_cpp
sys.modules["llama_cpp.mtmd_cpp"] = llama_cpp.mtmd_cpp = types.ModuleType("llama_cpp.mtmd_cpp")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def packages(folder: Path = PEERS) -> Path:
    """Returns the folder of the server's dependencies; installs them first if they are missing. Raises SetupError if
    pip fails."""
    target = folder / "example"
    if not (target / "fastapi").exists():
        run_pip("install", "--quiet", "--target", str(target), *REQUIREMENTS)
    return target


def configuration(settings: Settings, port: int) -> dict[str, Any]:
    """Returns the content of the server's configuration file."""
    model = {
        "path": str(settings.model),
        "n_ctx": settings.context,
        "n_seq_max": settings.slots,
        "n_batch": 2048,
        "n_ubatch": 512,
        "threads": settings.threads,
        "threads_batch": settings.threads,
        "flash_attn": settings.flash_attention == "on",
        "kv_unified": True,
        "store_logits": False,
    }
    return {"server": {"host": HOST, "port": port}, "model": model}


def adapted(body: dict[str, Any], ends: tuple[int, ...]) -> dict[str, Any]:
    """Returns `body` with `ignore_eos` expressed as a bias against the end tokens `ends`; the server supports only
    biases.

    A body without `ignore_eos` is returned unchanged; with an empty `ends` every body is.
    """
    if not (ends and body.get("ignore_eos")):
        return body
    return {**body, "logit_bias": {str(token): -100 for token in ends}}


@contextmanager
def example_server(settings: Settings, seconds: float = 120) -> Iterator[Server]:
    """Runs the example server for the length of the block. Raises SetupError if the sdist is not unpacked, and
    RuntimeError with the last lines of output if the server is not healthy in `seconds`.
    """
    script, port = sources(PEERS, pinned()) / "examples" / "server" / "server.py", free_port()
    if not script.exists():
        raise SetupError("the sdist is not unpacked yet: python -m bench.peers build")
    path = os.pathsep.join(filter(None, (str(packages()), os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as log:
        config = Path(folder) / "config.json"
        config.write_bytes(msgspec.json.encode(configuration(settings, port)))
        command = [sys.executable, "-c", LAUNCH, str(script), "-C", str(config)]
        environment = os.environ | {"PYTHONPATH": path}
        with running(command, port, seconds, log, health="/healthz", environment=environment) as server:
            yield server
