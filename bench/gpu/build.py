"""Builds libllama, llama-server and the binding from the bundled sources, without a network: see build.sh.

Both servers run the same library: llama-server is linked with it, and llama-cpp-python is installed without a
library and then gets links to it. An interrupted build is resumed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from sysconfig import get_path

from bench.gpu.bundle import PARTS_FOLDER, ROOT
from bench.models import SetupError
from bench.peers import PEERS, binary, build, pinned, sources

# Folder of links to CUDA's libraries under their names without a version, which the linker needs.
LINKS = PARTS_FOLDER / "links"
CUDA_LIBRARIES = ("libcublas.so", "libcublasLt.so")
DRIVER = "libcuda.so"
# Folders that are searched for the driver's library, in addition to the linker's cache and the toolkit's stubs.
DRIVER_FOLDERS = ("/usr/local/nvidia/lib64", "/usr/local/nvidia/lib", "/usr/lib/x86_64-linux-gnu", "/usr/lib64")


def toolkit() -> Path:
    """Returns the folder of the CUDA toolkit of `nvcc`. Raises SetupError if there is no nvcc."""
    if (compiler := shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")) is None:
        raise SetupError("there is no nvcc: put the CUDA toolkit's bin on the PATH, or build with BACKEND=cpu")
    tops = [line.partition(" TOP=")[2] for line in output_lines(compiler, "--dryrun", "-x", "cu", "-c", os.devnull)]
    return Path(next(filter(None, tops), Path(compiler).resolve().parents[1])).resolve()


def output_lines(*command: str) -> list[str]:
    """Returns the output of a command, even if the command fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return done.stdout.splitlines()


def site_packages() -> list[Path]:
    """Returns the folders of installed packages of every Python on the PATH."""
    pythons = [str(python) for folder in os.get_exec_path() if (python := Path(folder) / "python3").exists()]
    lines = [
        line for python in pythons for line in output_lines(python, "-c", "import sys; print(*sys.path, sep='\\n')")
    ]
    return [*dict.fromkeys(Path(line) for line in lines if line.endswith("-packages"))]


def cublas(top: Path, packages: Iterable[Path]) -> tuple[Path, Path]:
    """Returns the folders of cuBLAS's headers and libraries.

    The toolkit, `$CUBLAS` and installed nvidia-cublas packages are searched in this order. Raises SetupError if none of
    them has cuBLAS.
    """
    folders = [top, *(Path(folder) for folder in [os.environ.get("CUBLAS", "")] if folder)]
    folders += [package / "nvidia" / name for package in packages for name in ("cu13", "cublas")]
    for folder in folders:
        for libraries in (folder / "lib64", folder / "lib"):
            if (folder / "include" / "cublas_v2.h").exists() and any(libraries.glob(f"{CUDA_LIBRARIES[0]}*")):
                return folder / "include", libraries
    raise SetupError(f"cuBLAS is neither in {top} nor in a Python's nvidia-cublas; set $CUBLAS to its folder")


def driver(top: Path) -> Path | None:
    """Returns the driver's library or the toolkit's stub of it. `None` means that there is neither."""
    listed = [Path(line.rpartition("=> ")[2]) for line in output_lines("/sbin/ldconfig", "-p") if DRIVER in line]
    folders = [*map(Path, DRIVER_FOLDERS), top / "lib64" / "stubs", top / "lib" / "stubs"]
    listed += [path for folder in folders for path in sorted(folder.glob(f"{DRIVER}*"))]
    return next((path for path in listed if path.exists()), None)


def link(libraries: Iterable[Path], folder: Path) -> None:
    """Links libraries in `folder` under their own names and under their names without a version."""
    folder.mkdir(parents=True, exist_ok=True)
    for library in libraries:
        for name in (library.name, f"{library.name.partition('.so')[0]}.so"):
            link_path = folder / name
            link_path.unlink(missing_ok=True)
            link_path.symlink_to(library)


def cuda_flags() -> list[str]:
    """Returns CMake's flags for the GPUs of this host. Raises SetupError if a part of CUDA is missing."""
    top = toolkit()
    headers, libraries = cublas(top, site_packages())
    link((path for name in CUDA_LIBRARIES for path in sorted(libraries.glob(f"{name}*"))), LINKS)
    flags = [
        "-DGGML_CUDA=ON",
        f"-DCMAKE_CUDA_ARCHITECTURES={os.environ.get('CUDA_ARCHITECTURES', 'native')}",
        f"-DCMAKE_CUDA_COMPILER={top / 'bin' / 'nvcc'}",
        f"-DCMAKE_CUDA_FLAGS=-I{headers}",
        f"-DCUDA_cublas_LIBRARY={LINKS / CUDA_LIBRARIES[0]}",
        f"-DCUDA_cublasLt_LIBRARY={LINKS / CUDA_LIBRARIES[1]}",
    ]
    if (found := driver(top)) is None:
        return [*flags, "-DGGML_CUDA_NO_VMM=ON"]  # VMM is the only use of the driver's library
    link([found], LINKS)
    return [*flags, f"-DCUDA_cuda_driver_LIBRARY={LINKS / DRIVER}"]


def install(*packages: str) -> None:
    """Installs packages without their dependencies, which are installed already. Raises SetupError if pip fails."""
    (pip,) = (PARTS_FOLDER / "wheels").glob("pip-*.whl")
    words = ["install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--force-reinstall", *packages]
    if subprocess.run([sys.executable, f"{pip}/pip", *words], check=False).returncode:
        raise SetupError(f"{packages[-1]} could not be installed")


def install_binding(source: Path, libraries: Path) -> None:
    """Installs llama-cpp-python without its library, and links the built libraries. Raises SetupError if pip fails."""
    os.environ["CMAKE_ARGS"] = "-DLLAMA_BUILD=OFF"
    install(str(source))
    link(sorted(libraries.glob("lib*.so*")), Path(get_path("purelib")) / "llama_cpp" / "lib")


def main(arguments: Sequence[str] | None = None) -> None:
    """Builds for CUDA or the CPU, and installs the binding and Paceline."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backend", choices=["cuda", "cpu"], help="backend of the library")
    options = parser.parse_args(arguments)
    try:
        given = os.environ.get("CMAKE_ARGS", "")
        flags = cuda_flags() if options.backend == "cuda" else []
        os.environ["CMAKE_ARGS"] = " ".join([*flags, given])
        source = sources(PEERS, pinned())
        program = build(PARTS_FOLDER / f"{source.name}.tar.gz")
        install_binding(source, program.parent)
        install("--editable", str(ROOT))
    except (SetupError, OSError) as error:
        raise SystemExit(f"\n{error}") from None
    print(f"{program}\n{binary(source).parent / 'libllama.so'}")


if __name__ == "__main__":
    main()
