"""One archive for a GPU host without a network: `make gpu-bundle` there, `bash bench/gpu/build.sh` on the host.

It holds what git tracks here, the part of llama-cpp-python's sdist that a build for CUDA or a CPU needs, wheels for
x86-64 Linux and CPython 3.12 of everything that serving, measuring and the native tests import, and SmolLM2's tokenizer
as a GGUF without tensors. Every download is compared with its hash in `wheels.txt`; `python -m bench.gpu.bundle lock`
writes that anew after dependencies changed. Nothing is ever committed: parts go to `.gpu`, the archive to `build`.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from bench.gpu.models import write_tokenizer
from bench.models import SOURCES, Refused, bring, digest
from bench.peers import PACKAGE, pinned, pip_download, sources

ROOT = Path(__file__).parents[2]
PARTS = ROOT / ".gpu"
"""What travels besides the tracked files, at the same place on the host."""
ARCHIVE = ROOT / "build" / "paceline-gpu.tar.gz"
FOLDER = "paceline"
"""What the archive unpacks to."""
LOCK = Path(__file__).parent / "wheels.txt"
TOKENIZER = "tokenizer.gguf"
MOST = 60_000_000
"""Bytes of the archive at most."""

PYTHON = "3.12"
PLATFORMS = (
    "manylinux_2_31_x86_64",
    "manylinux_2_28_x86_64",
    "manylinux_2_27_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
)
BINDING = ("typing-extensions>=4.5", "diskcache>=5.6.1", "scikit-build-core>=0.9.2", "setuptools>=75", "pip")
"""What llama-cpp-python imports beyond our own dependencies, and what it and we are built and installed with."""

KEPT = (
    "CMakeLists.txt",
    "LICENSE.md",
    "PKG-INFO",
    "README.md",
    "pyproject.toml",
    "llama_cpp/",
    "vendor/llama.cpp/CMakeLists.txt",
    "vendor/llama.cpp/LICENSE",
    "vendor/llama.cpp/cmake/",
    "vendor/llama.cpp/common/",
    "vendor/llama.cpp/ggml/",
    "vendor/llama.cpp/include/",
    "vendor/llama.cpp/licenses/",
    "vendor/llama.cpp/scripts/ui-assets.cmake",
    "vendor/llama.cpp/src/",
    "vendor/llama.cpp/tools/",
    "vendor/llama.cpp/vendor/",
)
"""Files and folders of the sdist that a build reads. All tools stay, as the build is described for all of them."""
BACKENDS = ("ggml-cpu", "ggml-cuda")
GGML = "vendor/llama.cpp/ggml/src/"
DROPPED_FOLDERS = ("tests", "bench", "debug-data", "legacy-models")
"""Folders below `tools` that nothing is compiled from."""
UI = "vendor/llama.cpp/tools/ui/"
UI_KEPT = ("CMakeLists.txt", "sources.cmake", "ui.cpp.in", "ui.h.in")
"""Of the server's page, which is not built, what its build's description reads."""
DROPPED_ENDINGS = (".md", ".py", ".sh", ".txt", ".jpeg", ".png", ".mp3", ".mp4", ".wav", ".gif")
"""Of files below `tools` that nothing is compiled from, but for CMakeLists.txt."""


def kept(path: str) -> bool:
    """Whether the build needs this file of the sdist; `path` begins in the sdist's folder."""
    if not any(path == name or (name.endswith("/") and path.startswith(name)) for name in KEPT):
        return False
    if path.startswith(GGML) and "/" in (rest := path.removeprefix(GGML)):
        return rest.partition("/")[0] in BACKENDS
    if path.startswith(UI):
        return path.removeprefix(UI) in UI_KEPT
    if path.startswith("vendor/llama.cpp/tools/"):
        *folders, name = path.split("/")
        return name == "CMakeLists.txt" or not (set(folders) & set(DROPPED_FOLDERS) or name.endswith(DROPPED_ENDINGS))
    return True


def trim(sdist: Path, target: Path) -> int:
    """Writes the kept files of an sdist to `target`, whole or not at all; how many they are."""
    count = 0
    part = target.with_suffix(".part")
    with tarfile.open(sdist) as source, tarfile.open(part, "w:gz") as out:
        for member in source:
            if member.isfile() and kept(member.name.partition("/")[2]):
                out.addfile(member, source.extractfile(member))
                count += 1
    part.replace(target)
    return count


# ── what is downloaded ──


def requirements(project: Path = ROOT / "pyproject.toml") -> list[str]:
    """What is imported on the host, but for llama-cpp-python, which is built there."""
    about = tomllib.loads(project.read_text())["project"]
    own = [name for name in about["dependencies"] if not name.startswith(PACKAGE)]
    return [*own, *about["optional-dependencies"]["test"], *BINDING]


def of_host() -> list[str]:
    """Tells pip to look for the host's wheels and not for this machine's."""
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    return ["--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp", *platforms]


def pip(*words: str) -> None:
    """Runs pip. Raises Refused if it fails; it has said why."""
    if subprocess.run([sys.executable, "-m", "pip", *words, "--disable-pip-version-check"], check=False).returncode:
        raise Refused(f"pip {words[0]} failed")


def locked(lock: Path = LOCK) -> dict[str, str]:
    """The lines of the lock by requirement, each with its hash: of all wheels and of the sdist."""
    lines = [line for line in lock.read_text().splitlines() if line and not line.startswith("#")]
    return {line.partition(" ")[0]: line for line in lines}


def write_lock() -> None:
    """Resolves the dependencies for the host anew, and writes names, versions and hashes. Raises Refused."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        target = ["--target", folder, "--dry-run", "--quiet", "--report", str(report)]
        pip("install", *target, *of_host(), *requirements())
        found = msgspec.json.decode(report.read_bytes())["install"]
        sdist = pip_download(f"{PACKAGE}=={pinned()}", Path(folder))
        pins = {f"{PACKAGE}=={pinned()}": digest(sdist)}
    for wheel in found:
        name = f"{wheel['metadata']['name'].lower().replace('_', '-')}=={wheel['metadata']['version']}"
        pins[name] = wheel["download_info"]["archive_info"]["hashes"]["sha256"]
    lines = [f"{name} --hash=sha256:{pins[name]}\n" for name in sorted(pins)]
    LOCK.write_text(f"# CPython {PYTHON}, x86-64 Linux; written by python -m bench.gpu.bundle lock\n{''.join(lines)}")


def bring_wheels(folder: Path) -> None:
    """Puts the locked wheels, and no others, into `folder`; pip checks their hashes. Raises Refused."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as wanted:
        wanted.write("\n".join(line for name, line in locked().items() if not name.startswith(f"{PACKAGE}==")))
        wanted.flush()
        with tempfile.TemporaryDirectory(dir=folder.parent) as fresh:
            where = ["--no-deps", "--require-hashes", "-r", wanted.name, "--find-links", str(folder), "--dest", fresh]
            pip("download", "--quiet", *of_host(), *where)
            shutil.rmtree(folder)
            shutil.copytree(fresh, folder)


def bring_sources(target: Path) -> None:
    """Writes the trimmed sdist to `target` unless it is there. Raises Refused if the sdist is another than locked."""
    if target.exists():
        return
    requirement = f"{PACKAGE}=={pinned()}"
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        sdist = pip_download(requirement, Path(folder))
        if not (line := locked().get(requirement)) or not line.endswith(f":{digest(sdist)}"):
            raise Refused(f"{sdist.name} is not what {LOCK.name} says; python -m bench.gpu.bundle lock writes it anew")
        print(f"kept {trim(sdist, target)} files of {sdist.name}", flush=True)


# ── the archive ──


def tracked() -> list[str]:
    """What git tracks here."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [name for name in listed.split("\0") if name]


def pack(target: Path, files: Iterable[Path], root: Path = ROOT) -> int:
    """Archives `files` of `root` below `FOLDER`, whole or not at all; its size in bytes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(".part")
    with tarfile.open(part, "w:gz") as out:
        for path in sorted(files):
            out.add(path, f"{FOLDER}/{path.relative_to(root)}", recursive=False)
    part.replace(target)
    return target.stat().st_size


def bundle() -> str:
    """Assembles everything and says what came of it. Raises Refused."""
    PARTS.mkdir(exist_ok=True)
    bring_wheels(PARTS / "wheels")
    bring_sources(PARTS / f"{sources(PARTS, pinned()).name}.tar.gz")
    if not (PARTS / TOKENIZER).exists():
        source = SOURCES["smollm2"]
        bring(source, source.path)
        write_tokenizer(source.path, PARTS / TOKENIZER)
    parts = [path for path in PARTS.rglob("*") if path.suffix in (".whl", ".gz", ".gguf")]
    size = pack(ARCHIVE, [*(ROOT / name for name in tracked()), *parts])
    if size > MOST:
        raise Refused(f"{ARCHIVE} has {size / 1e6:.1f} MB, {MOST / 1e6:.0f} MB are the most")
    return f"{ARCHIVE}: {size / 1e6:.1f} MB, sha256 {digest(ARCHIVE)}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Assembles the archive, or writes the lock."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["bundle", "lock"], default="bundle")
    try:
        if parser.parse_args(arguments).what == "lock":
            write_lock()
            print(f"wrote {LOCK}")
        else:
            print(bundle())
    except (Refused, OSError) as error:
        raise SystemExit(f"\n{error}") from None


if __name__ == "__main__":
    main()
