"""Builds llama-server from the sources that llama-cpp-python compiles, and runs it with the settings of Paceline.

`python -m bench.peers build` downloads the sdist of the pinned version with pip and compiles llama-server from its
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

from bench.models import MODELS_FOLDER, SetupError, run_pip
from bench.server import HOST, Server, free_port, running, serving

# Folder of sources and builds, and of build tools on a machine without them.
PEERS = MODELS_FOLDER / "peers"

PACKAGE = "llama-cpp-python"

# The flags that the Makefile adds to llama-cpp-python's own build.
KERNEL_FLAGS = ("-DCMAKE_C_FLAGS=-U__AMX_INT8__", "-DCMAKE_CXX_FLAGS=-U__AMX_INT8__")

# Flags of a build for this machine only; by default the build also downloads the server's web page.
BUILD_FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
)

PACELINE = "paceline"

# llama-server's KV layouts: unified KV, per-slot KV, and per-slot KV with flash attention and default cache types.
# A mode without `-fa` has the flash attention of `Settings`, by default off.
MODES = {
    "llama-server-unified": ("--kv-unified",),
    "llama-server-split": ("--no-kv-unified",),
    "llama-server-split-flash": ("--no-kv-unified", "-fa", "on"),
}

# Unified KV with further settings: flash attention for many slots, small batches against stalls, and drafts that are
# long enough to pay.
TUNED = {
    "llama-server-flash": (*MODES["llama-server-unified"], "-fa", "on", "-ctv", "bf16"),
    "llama-server-b256": (*MODES["llama-server-unified"], "-b", "256"),
    "llama-server-ngram-mod": (
        *MODES["llama-server-unified"],
        *("--spec-type", "ngram-mod", "--spec-ngram-mod-n-match", "16", "--spec-ngram-mod-n-min", "4"),
    ),
}

# Called with a requirement and an empty folder; returns the path of the sdist.
SdistDownload = Callable[[str, Path], Path]

# Called with the number of compiled files and the number of all files.
BuildReport = Callable[[int, int], None]


class Settings(msgspec.Struct, frozen=True):
    """The settings of a server. `context` is in tokens, for all slots together.

    `flash_attention` is the value of `-fa` for llama-server. `started` omits the flag for Paceline, which chooses flash
    attention and the KV layout at start.
    """

    model: Path
    context: int
    slots: int
    threads: int
    flash_attention: str = "off"

    def flags(self) -> list[str]:
        """Returns llama-server's flags without the model. Flags that are left out, such as -b and -ub, have equal
        defaults."""
        return [*self.common(), "-fa", self.flash_attention]

    def common(self) -> list[str]:
        """Returns the flags that are equal for all servers: context, slots and threads."""
        counts = {"-c": self.context, "-np": self.slots, "-t": self.threads, "-tb": self.threads}
        return [word for flag, count in counts.items() for word in (flag, str(count))]


def pinned(project: Path = MODELS_FOLDER.parent / "pyproject.toml") -> str:
    """Returns the version of llama-cpp-python that the project depends on."""
    dependencies = tomllib.loads(project.read_text())["project"]["dependencies"]
    (version,) = (name.partition("==")[2] for name in dependencies if name.startswith(f"{PACKAGE}=="))
    return str(version)


def sources(folder: Path, version: str) -> Path:
    """Returns the folder of the unpacked sdist of this version, existing or not."""
    return folder / f"{PACKAGE.replace('-', '_')}-{version}"


def binary(source: Path) -> Path:
    """Returns the path of llama-server in this unpacked sdist."""
    return source / "build" / "bin" / "llama-server"


def pip_download(requirement: str, folder: Path) -> Path:
    """Downloads an sdist into the empty `folder`; pip prints its progress. Raises SetupError if pip fails."""
    run_pip("download", "--no-deps", "--no-binary", PACKAGE, "--dest", str(folder), requirement)
    (sdist,) = folder.glob("*.tar.gz")
    return sdist


def unpack(folder: Path, version: str, sdist: Path | None = None, download: SdistDownload = pip_download) -> Path:
    """Returns the folder of the unpacked sdist; downloads it only if the folder does not exist.

    The folder is complete or absent. Raises SetupError for an sdist of another package or version.
    """
    source = sources(folder, version)
    if source.exists():
        return source
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        try:
            with tarfile.open(sdist or download(f"{PACKAGE}=={version}", Path(temporary))) as archive:
                archive.extractall(temporary, filter="data")
        except (OSError, tarfile.TarError) as error:
            raise SetupError(f"the sdist cannot be read: {error}") from error
        unpacked = Path(temporary) / source.name
        if not (unpacked / "vendor" / "llama.cpp" / "CMakeLists.txt").exists():
            raise SetupError(f"the sdist has no {source.name}/vendor/llama.cpp")
        unpacked.replace(source)
    return source


def with_tools(folder: Path) -> dict[str, str]:
    """Returns an environment with cmake and ninja on the PATH; installs both from wheels if this machine lacks them."""
    if all(map(shutil.which, ("cmake", "ninja"))):
        return dict(os.environ)
    tools = folder / "tools"
    if not (tools / "bin" / "ninja").exists():
        subprocess.run([sys.executable, "-m", "venv", str(tools)], check=True)
        subprocess.run([str(tools / "bin" / "pip"), "install", "--quiet", "cmake", "ninja"], check=True)
    return os.environ | {"PATH": f"{tools / 'bin'}{os.pathsep}{os.environ['PATH']}"}


def commands(source: Path, cmake_args: str = "") -> tuple[list[str], list[str]]:
    """Returns the commands that configure and compile llama-server; `cmake_args` is the value of CMAKE_ARGS."""
    tree, build = str(source / "vendor" / "llama.cpp"), str(binary(source).parents[1])
    configure = ["cmake", "-S", tree, "-B", build, "-G", "Ninja", *BUILD_FLAGS, *KERNEL_FLAGS, *shlex.split(cmake_args)]
    return configure, ["cmake", "--build", build, "--target", "llama-server", "--parallel", str(os.cpu_count() or 1)]


def parse_ninja_counts(line: str) -> tuple[int, int] | None:
    """Returns the counts of compiled files and of all files in a line of ninja. `None` means a line without counts."""
    found = re.match(r"\[(\d+)/(\d+)\] ", line)
    return (int(found[1]), int(found[2])) if found else None


def run_logged(command: Sequence[str], environment: dict[str, str], log: Path, report: BuildReport) -> None:
    """Runs a command with its output in `log`. Raises SetupError with the last lines of output if the command fails."""
    with (
        log.open("w") as copy,
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run,
    ):
        assert run.stdout is not None
        for line in run.stdout:
            copy.write(line)
            if counts := parse_ninja_counts(line):
                report(*counts)
    if run.returncode:
        last = "\n".join(log.read_text().splitlines()[-15:])
        raise SetupError(f"{last}\n{command[0]} failed; its output is in {log}")


def show_steps(done: int, total: int) -> None:
    """Redraws the counter on a terminal; otherwise prints a line for each tenth of the files."""
    if sys.stdout.isatty():
        print(f"\r  compiled {done}/{total}\033[K", end="\n" if done == total else "", flush=True)
    elif 10 * done // total > 10 * (done - 1) // total:
        print(f"  compiled {done}/{total}", flush=True)


def build(sdist: Path | None = None, report: BuildReport = show_steps) -> Path:
    """Builds llama-server unless it is built, resuming an interrupted build, and returns its path.

    Raises SetupError if a download or a command fails.
    """
    source = unpack(PEERS, pinned(), sdist)
    if not binary(source).exists():
        print(f"Building llama-server: about 13 minutes on 2 cores (logs: {source}/*.log)", flush=True)
        environment, cmake_args = with_tools(PEERS), os.environ.get("CMAKE_ARGS", "")
        for name, command in zip(("configure", "compile"), commands(source, cmake_args), strict=True):
            run_logged(command, environment, source / f"{name}.log", report)
    return binary(source)


def command_line(program: Path, settings: Settings, port: int, mode: Sequence[str]) -> list[str]:
    """Returns the command of llama-server on loopback, without its web page and without downloads of models."""
    where = ["--host", HOST, "--port", str(port), "--no-ui", "--offline"]
    return [str(program), "-m", str(settings.model), *where, *settings.flags(), *mode]


@contextmanager
def llama_server(settings: Settings, mode: Sequence[str], seconds: float = 120) -> Iterator[Server]:
    """Runs llama-server for the length of the block.

    Raises SetupError if llama-server is not built, and RuntimeError with the last lines of output if the server is not
    healthy in `seconds`.
    """
    program, port = binary(sources(PEERS, pinned())), free_port()
    if not program.exists():
        raise SetupError("llama-server is not built yet: python -m bench.peers build")
    command = command_line(program, settings, port, mode)
    with tempfile.TemporaryFile("w+") as log, running(command, port, seconds, log) as server:
        yield server


def started(name: str, settings: Settings) -> AbstractContextManager[Server]:
    """Runs Paceline or a mode of llama-server on a free port of loopback for the length of the block.

    Paceline has its default flags except context, slots and threads.
    """
    if name == PACELINE:
        return serving(settings.model, settings.common())
    return llama_server(settings, (MODES | TUNED)[name])


def main() -> None:
    """Builds llama-server and prints its path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["build"], help="build llama-server, unless it is built")
    parser.add_argument("--sdist", type=Path, help=f"{PACKAGE}'s sdist; downloaded with pip by default")
    try:
        print(f"llama-server is {build(parser.parse_args().sdist)}")
    except (SetupError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"\n{error}") from None


if __name__ == "__main__":
    main()
