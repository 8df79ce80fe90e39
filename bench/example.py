"""llama-cpp-python's own example server, `examples/server/server.py` of its sdist, started beside Paceline.

It runs on the very library that Paceline uses. What it needs besides is installed into a folder of its own. It would
load the library's part for images, which is not built here: an empty module stands for it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from bench.models import Refused
from bench.peers import PEERS, Settings, pinned, sources
from bench.server import HOST, Server, free_port, running

EXAMPLE = "llama-cpp-python"
"""Its name among the contenders."""

NEEDS = ("fastapi>=0.115,<1", "uvicorn>=0.40,<1", "pydantic>=2,<3", "jinja2>=3,<4", "openai>=3,<4")

LAUNCH = """
import runpy, sys, types, llama_cpp
sys.modules["llama_cpp.mtmd_cpp"] = llama_cpp.mtmd_cpp = types.ModuleType("llama_cpp.mtmd_cpp")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def packages(folder: Path = PEERS) -> Path:
    """Where its dependencies are; pip brings them if need be. Raises Refused if it cannot."""
    place = folder / "example"
    if not (place / "fastapi").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        done = subprocess.run([*pip, "--target", str(place), *NEEDS], check=False, capture_output=True, text=True)
        if done.returncode:
            raise Refused(f"pip could not bring {', '.join(NEEDS)}: {done.stderr.strip().splitlines()[-1]}")
    return place


def configuration(settings: Settings, port: int) -> dict[str, Any]:
    """Its settings, equal to the others'."""
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
    """`body` as it understands it: `ignore_eos` by a bias on `ends`, the tokens that end a text; as it is without."""
    if not (ends and body.get("ignore_eos")):
        return body
    return {**body, "logit_bias": {str(token): -100 for token in ends}}


@contextmanager
def example_server(settings: Settings, seconds: float = 120) -> Iterator[Server]:
    """Serves with it for the length of the block. Raises Refused if the sdist is not unpacked, RuntimeError with its
    last words if it is not healthy in `seconds`.
    """
    script, port = sources(PEERS, pinned()) / "examples" / "server" / "server.py", free_port()
    if not script.exists():
        raise Refused("the sdist is not here yet: python -m bench.peers build")
    path = os.pathsep.join(filter(None, (str(packages()), os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as log:
        config = Path(folder) / "config.json"
        config.write_bytes(msgspec.json.encode(configuration(settings, port)))
        command = [sys.executable, "-c", LAUNCH, str(script), "-C", str(config)]
        environment = os.environ | {"PYTHONPATH": path}
        with running(command, port, seconds, log, health="/healthz", environment=environment) as server:
            yield server
