"""Writes one archive for a GPU host without a network: `make gpu-bundle` here, `bash bench/gpu/build.sh` on the host.

The archive has the files that git tracks, the files of llama-cpp-python's sdist that a build for CUDA or a CPU needs,
wheels for x86-64 Linux and CPython 3.12 of all dependencies of server, measurements and native tests, and SmolLM2's
tokenizer as a GGUF without tensors. Every download is checked against its hash in `wheels.txt`, which
`python -m bench.gpu.bundle lock` rewrites after a change of dependencies. Parts are in `.gpu`, the archive is in
`build`; git ignores both.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tarfile
import tempfile
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from bench.gpu.models import write_tokenizer
from bench.models import SOURCES, SetupError, digest, fetch_or_exit, run_pip
from bench.peers import PACKAGE, pinned, pip_download, sources

ROOT = Path(__file__).parents[2]
# Parts of the archive that git does not track; they have the same path on the host.
PARTS_FOLDER = ROOT / ".gpu"
ARCHIVE = ROOT / "build" / "paceline-gpu.tar.gz"
# The top folder in the archive.
ARCHIVE_FOLDER = "paceline"
LOCK = Path(__file__).parent / "wheels.txt"
TOKENIZER = "tokenizer.gguf"
MAX_ARCHIVE_BYTES = 60_000_000

PYTHON = "3.12"
PLATFORMS = (
    "manylinux_2_31_x86_64",
    "manylinux_2_28_x86_64",
    "manylinux_2_27_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
)
# Further dependencies of llama-cpp-python, and the build tools of both packages.
BINDING_REQUIREMENTS = (
    "typing-extensions>=4.5",
    "diskcache>=5.6.1",
    "scikit-build-core>=0.9.2",
    "setuptools>=75",
    "pip",
)

# Files and folders of the sdist that a build reads. CMake configures all tools, so all of them are kept.
KEPT_PATHS = (
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
BACKENDS = ("ggml-cpu", "ggml-cuda")
GGML = "vendor/llama.cpp/ggml/src/"
# Folders below `tools` without sources of the build.
DROPPED_FOLDERS = ("tests", "bench", "debug-data", "legacy-models")
UI = "vendor/llama.cpp/tools/ui/"
# Files of the server's web page that CMake reads, although the page is not built.
UI_KEPT_PATHS = ("CMakeLists.txt", "sources.cmake", "ui.cpp.in", "ui.h.in")
# Endings of files below `tools` that the build does not read, CMakeLists.txt excepted.
DROPPED_ENDINGS = (".md", ".py", ".sh", ".txt", ".jpeg", ".png", ".mp3", ".mp4", ".wav", ".gif")


def kept(path: str) -> bool:
    """True if the build needs the file of the sdist; `path` is relative to the sdist's folder."""
    if not any(path == name or (name.endswith("/") and path.startswith(name)) for name in KEPT_PATHS):
        return False
    if path.startswith(GGML) and "/" in (rest := path.removeprefix(GGML)):
        return rest.partition("/")[0] in BACKENDS
    if path.startswith(UI):
        return path.removeprefix(UI) in UI_KEPT_PATHS
    if path.startswith("vendor/llama.cpp/tools/"):
        *folders, name = path.split("/")
        return name == "CMakeLists.txt" or not (set(folders) & set(DROPPED_FOLDERS) or name.endswith(DROPPED_ENDINGS))
    return True


def trim(sdist: Path, target: Path) -> int:
    """Writes the kept files of an sdist to `target` atomically, and returns their number."""
    count = 0
    part = target.with_suffix(".part")
    with tarfile.open(sdist) as source, tarfile.open(part, "w:gz") as out:
        for member in source:
            if member.isfile() and kept(member.name.partition("/")[2]):
                out.addfile(member, source.extractfile(member))
                count += 1
    part.replace(target)
    return count


# ── downloads ──


def requirements(project: Path = ROOT / "pyproject.toml") -> list[str]:
    """Returns all dependencies on the host except llama-cpp-python, which is built there."""
    about = tomllib.loads(project.read_text())["project"]
    own = [name for name in about["dependencies"] if not name.startswith(PACKAGE)]
    return [*own, *about["optional-dependencies"]["test"], *BINDING_REQUIREMENTS]


def host_platform() -> list[str]:
    """Returns pip's flags for wheels of the host's platform."""
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    return ["--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp", *platforms]


def locked(lock: Path = LOCK) -> dict[str, str]:
    """Returns the lines of the lock by requirement; each line has the hash of a wheel or of the sdist."""
    lines = [line for line in lock.read_text().splitlines() if line and not line.startswith("#")]
    return {line.partition(" ")[0]: line for line in lines}


def write_lock() -> None:
    """Resolves the dependencies for the host, and writes names, versions and hashes. Raises SetupError if pip fails."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        target = ["--target", folder, "--dry-run", "--quiet", "--report", str(report)]
        run_pip("install", *target, *host_platform(), *requirements())
        found = msgspec.json.decode(report.read_bytes())["install"]
        sdist = pip_download(f"{PACKAGE}=={pinned()}", Path(folder))
        pins = {f"{PACKAGE}=={pinned()}": digest(sdist)}
    for wheel in found:
        name = f"{wheel['metadata']['name'].lower().replace('_', '-')}=={wheel['metadata']['version']}"
        pins[name] = wheel["download_info"]["archive_info"]["hashes"]["sha256"]
    lines = [f"{name} --hash=sha256:{pins[name]}\n" for name in sorted(pins)]
    LOCK.write_text(f"# CPython {PYTHON}, x86-64 Linux; written by python -m bench.gpu.bundle lock\n{''.join(lines)}")


def download_wheels(folder: Path) -> None:
    """Downloads exactly the locked wheels into `folder`; pip checks their hashes. Raises SetupError if pip fails."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as wanted:
        wanted.write("\n".join(line for name, line in locked().items() if not name.startswith(f"{PACKAGE}==")))
        wanted.flush()
        with tempfile.TemporaryDirectory(dir=folder.parent) as fresh:
            where = ["--no-deps", "--require-hashes", "-r", wanted.name, "--find-links", str(folder), "--dest", fresh]
            run_pip("download", "--quiet", *host_platform(), *where)
            shutil.rmtree(folder)
            shutil.copytree(fresh, folder)


def download_sources(target: Path) -> None:
    """Writes the trimmed sdist to `target` unless it exists. Raises SetupError if the hash of the sdist is wrong."""
    if target.exists():
        return
    requirement = f"{PACKAGE}=={pinned()}"
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        sdist = pip_download(requirement, Path(folder))
        if not (line := locked().get(requirement)) or not line.endswith(f":{digest(sdist)}"):
            raise SetupError(f"{sdist.name} differs from {LOCK.name}; python -m bench.gpu.bundle lock rewrites it")
        print(f"kept {trim(sdist, target)} files of {sdist.name}", flush=True)


# ── the archive ──


def tracked() -> list[str]:
    """Returns the files that git tracks."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [name for name in listed.split("\0") if name]


def pack(target: Path, files: Iterable[Path], root: Path = ROOT) -> int:
    """Archives `files` of `root` below `ARCHIVE_FOLDER` atomically, and returns the size in bytes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(".part")
    with tarfile.open(part, "w:gz") as out:
        for path in sorted(files):
            out.add(path, f"{ARCHIVE_FOLDER}/{path.relative_to(root)}", recursive=False)
    part.replace(target)
    return target.stat().st_size


def bundle() -> str:
    """Writes the archive and returns a message. Raises SetupError if a download fails or the archive is too large."""
    PARTS_FOLDER.mkdir(exist_ok=True)
    download_wheels(PARTS_FOLDER / "wheels")
    download_sources(PARTS_FOLDER / f"{sources(PARTS_FOLDER, pinned()).name}.tar.gz")
    if not (PARTS_FOLDER / TOKENIZER).exists():
        source = SOURCES["smollm2"]
        fetch_or_exit(source, source.path)
        write_tokenizer(source.path, PARTS_FOLDER / TOKENIZER)
    parts = [path for path in PARTS_FOLDER.rglob("*") if path.suffix in (".whl", ".gz", ".gguf")]
    size = pack(ARCHIVE, [*(ROOT / name for name in tracked()), *parts])
    if size > MAX_ARCHIVE_BYTES:
        raise SetupError(f"{ARCHIVE} has {size / 1e6:.1f} MB, more than the limit of {MAX_ARCHIVE_BYTES / 1e6:.0f} MB")
    return f"{ARCHIVE}: {size / 1e6:.1f} MB, sha256 {digest(ARCHIVE)}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the archive, or with `lock` the lock file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["bundle", "lock"], default="bundle", help="file to write")
    try:
        if parser.parse_args(arguments).what == "lock":
            write_lock()
            print(f"wrote {LOCK}")
        else:
            print(bundle())
    except (SetupError, OSError) as error:
        raise SystemExit(f"\n{error}") from None


if __name__ == "__main__":
    main()
