"""llama-server beside Paceline: built out of the very sources that llama-cpp-python compiles, and started alike.

`python -m bench.peers build` brings the sdist of the pinned version with pip and compiles llama-server from its
`vendor/llama.cpp` with the flags of the Makefile, so both servers run the same kernels and only the servers differ.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import msgspec

from bench.models import FOLDER, Refused
from bench.server import HOST, Server, free_port, running, serving

PEERS = FOLDER / "peers"
"""Where sources, builds and, if need be, build tools are kept."""

PACKAGE = "llama-cpp-python"

KERNELS = ("-DCMAKE_C_FLAGS=-U__AMX_INT8__", "-DCMAKE_CXX_FLAGS=-U__AMX_INT8__")
"""What the Makefile adds to llama-cpp-python's own build."""

BARE = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
)
"""A server for this machine and nothing else. By default the build would also fetch a page for it from the network."""

PACELINE = "paceline"

MODES = {"llama-server-unified": ("--kv-unified",), "llama-server-split": ("--no-kv-unified",)}
"""llama-server's two ways to keep cells: one pool for all slots, or an equal part of the context for each."""

TUNED = {
    "llama-server-flash": (*MODES["llama-server-unified"], "-fa", "on", "-ctv", "bf16"),
    "llama-server-b256": (*MODES["llama-server-unified"], "-b", "256"),
    "llama-server-ngram-mod": (
        *MODES["llama-server-unified"],
        *("--spec-type", "ngram-mod", "--spec-ngram-mod-n-match", "16", "--spec-ngram-mod-n-min", "4"),
    ),
}
"""The same pool with what helps it most: flash attention with many slots, small batches against stalls, drafts long
enough to pay and short enough to come about."""

CONTENDERS = (PACELINE, *MODES)

Download = Callable[[str, Path], Path]
"""Called with a requirement and an empty folder; returns the sdist."""

Report = Callable[[int, int], None]
"""Called with the number of compiled files and of all."""


class Settings(msgspec.Struct, frozen=True):
    """What both servers are told alike. `context` is in tokens, for all slots together."""

    model: Path
    context: int
    slots: int
    threads: int
    flash_attention: str = "off"

    def flags(self) -> list[str]:
        """The command line that both read, without the model; what it leaves out, as -b and -ub, has equal defaults."""
        counts = {"-c": self.context, "-np": self.slots, "-t": self.threads, "-tb": self.threads}
        return [*(word for flag, count in counts.items() for word in (flag, str(count))), "-fa", self.flash_attention]


def pinned(project: Path = FOLDER.parent / "pyproject.toml") -> str:
    """The version of llama-cpp-python that the project depends on."""
    dependencies = tomllib.loads(project.read_text())["project"]["dependencies"]
    (version,) = (name.partition("==")[2] for name in dependencies if name.startswith(f"{PACKAGE}=="))
    return str(version)


def sources(folder: Path, version: str) -> Path:
    """Where the unpacked sdist of this version is, or goes."""
    return folder / f"{PACKAGE.replace('-', '_')}-{version}"


def binary(source: Path) -> Path:
    """llama-server as built in this unpacked sdist."""
    return source / "build" / "bin" / "llama-server"


def pip_download(requirement: str, folder: Path) -> Path:
    """Downloads an sdist into `folder`; pip says how far it is. Raises Refused if pip fails."""
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    command = [*pip, "--no-binary", PACKAGE, "--dest", str(folder), requirement]
    if subprocess.run(command, check=False).returncode:
        raise Refused(f"pip could not bring {requirement}")
    (sdist,) = folder.glob("*.tar.gz")
    return sdist


def unpack(folder: Path, version: str, sdist: Path | None = None, download: Download = pip_download) -> Path:
    """The unpacked sdist, whole or not there at all; brings nothing if it is there. Raises Refused if it is another."""
    source = sources(folder, version)
    if source.exists():
        return source
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        try:
            with tarfile.open(sdist or download(f"{PACKAGE}=={version}", Path(place))) as archive:
                archive.extractall(place, filter="data")
        except (OSError, tarfile.TarError) as error:
            raise Refused(f"the sdist cannot be read: {error}") from error
        unpacked = Path(place) / source.name
        if not (unpacked / "vendor" / "llama.cpp" / "CMakeLists.txt").exists():
            raise Refused(f"the sdist has no {source.name}/vendor/llama.cpp")
        unpacked.replace(source)
    return source


def with_tools(folder: Path) -> dict[str, str]:
    """The environment in which cmake and ninja are found; installs them from wheels if this machine has none."""
    if all(map(shutil.which, ("cmake", "ninja"))):
        return dict(os.environ)
    tools = folder / "tools"
    if not (tools / "bin" / "ninja").exists():
        subprocess.run([sys.executable, "-m", "venv", str(tools)], check=True)
        subprocess.run([str(tools / "bin" / "pip"), "install", "--quiet", "cmake", "ninja"], check=True)
    return os.environ | {"PATH": f"{tools / 'bin'}{os.pathsep}{os.environ['PATH']}"}


def commands(source: Path, more: str = "") -> tuple[list[str], list[str]]:
    """What configures llama-server and what compiles it; `more` is CMAKE_ARGS as llama-cpp-python's build reads it."""
    tree, build = str(source / "vendor" / "llama.cpp"), str(binary(source).parents[1])
    configure = ["cmake", "-S", tree, "-B", build, "-G", "Ninja", *BARE, *KERNELS, *shlex.split(more)]
    return configure, ["cmake", "--build", build, "--target", "llama-server", "--parallel", str(os.cpu_count() or 1)]


def steps(line: str) -> tuple[int, int] | None:
    """How many files are compiled, and of how many, if ninja says so in this line."""
    found = re.match(r"\[(\d+)/(\d+)\] ", line)
    return (int(found[1]), int(found[2])) if found else None


def carry_out(command: Sequence[str], environment: dict[str, str], log: Path, report: Report) -> None:
    """Runs a command with its output in `log`. Raises Refused with the last lines if it fails."""
    with (
        log.open("w") as copy,
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run,
    ):
        assert run.stdout is not None
        for line in run.stdout:
            copy.write(line)
            if counts := steps(line):
                report(*counts)
    if run.returncode:
        last = "\n".join(log.read_text().splitlines()[-15:])
        raise Refused(f"{last}\n{command[0]} failed; all it said is in {log}")


def show_steps(done: int, total: int) -> None:
    """Draws the counter in place on a terminal; elsewhere prints a line for each tenth."""
    if sys.stdout.isatty():
        print(f"\r  compiled {done}/{total}\033[K", end="\n" if done == total else "", flush=True)
    elif 10 * done // total > 10 * (done - 1) // total:
        print(f"  compiled {done}/{total}", flush=True)


def build(sdist: Path | None = None, report: Report = show_steps) -> Path:
    """Builds llama-server unless it is there, going on where a broken-off build stopped; returns it. Raises Refused."""
    source = unpack(PEERS, pinned(), sdist)
    if not binary(source).exists():
        print(f"Building llama-server: about 13 minutes on 2 cores (logs: {source}/*.log)", flush=True)
        environment, more = with_tools(PEERS), os.environ.get("CMAKE_ARGS", "")
        for name, command in zip(("configure", "compile"), commands(source, more), strict=True):
            carry_out(command, environment, source / f"{name}.log", report)
    return binary(source)


def command_line(program: Path, settings: Settings, port: int, mode: Sequence[str]) -> list[str]:
    """What starts llama-server on loopback. It would otherwise serve a page and look online for models."""
    where = ["--host", HOST, "--port", str(port), "--no-ui", "--offline"]
    return [str(program), "-m", str(settings.model), *where, *settings.flags(), *mode]


@contextmanager
def llama_server(settings: Settings, mode: Sequence[str], seconds: float = 120) -> Iterator[Server]:
    """Serves with llama-server for the length of the block. Raises Refused if it is not built, RuntimeError with its
    last words if it is not healthy in `seconds`.
    """
    program, port = binary(sources(PEERS, pinned())), free_port()
    if not program.exists():
        raise Refused("llama-server is not built yet: python -m bench.peers build")
    command = command_line(program, settings, port, mode)
    with tempfile.TemporaryFile("w+") as log, running(command, port, seconds, log) as server:
        yield server


def started(name: str, settings: Settings) -> AbstractContextManager[Server]:
    """One of CONTENDERS or TUNED, served on a free port of loopback for the length of the block and ended with it."""
    if name == PACELINE:
        return serving(settings.model, settings.flags())
    return llama_server(settings, (MODES | TUNED)[name])


def main() -> None:
    """Builds llama-server and says where it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["build"], help="build llama-server, unless it is built")
    parser.add_argument("--sdist", type=Path, help=f"{PACKAGE}'s sdist, if it is here already; pip brings it otherwise")
    try:
        print(f"llama-server is {build(parser.parse_args().sdist)}")
    except (Refused, subprocess.CalledProcessError) as error:
        raise SystemExit(f"\n{error}") from None


if __name__ == "__main__":
    main()
