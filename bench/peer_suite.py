"""Runs llama-server's own test suite against llama-server or Paceline, with tiny models in place of those of the hub.

    python -m bench.peer_suite llama-server
    python -m bench.peer_suite paceline [-k NAME] [unit/test_basic.py ...]
    python -m bench.peer_suite compare

The suite is part of the sources that `bench.peers build` unpacks, and runs in a virtual environment of its own.
A run prints the outcomes by file and saves them; `compare` lists what passes with llama-server and fails with Paceline,
by reason. Tests that need trained weights or a download fail with both.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from bench.models import SetupError
from bench.peers import PACELINE, PEERS, binary, pinned, sources, unpack
from bench.server import free_port
from bench.suite_models import write_models

_PROJECT = Path(__file__).parents[1]
SUITE = PEERS / "suite"
MODELS = SUITE / "models"
LLAMA_SERVER = "llama-server"
# Seconds after which a test fails.
TEST_SECONDS = 60
_REASON_CHARS = 150

# The stand-in for a model of the hub is the first whose key is a part of the repository's or the file's name.
STAND_INS = {
    "bert-bge": "bert.gguf",
    "jina-reranker": "rerank.gguf",
    "infill": "infill.gguf",
    "": "llama.gguf",
}
# Files that tests download into their folder `tmp`, and their stand-ins.
DOWNLOADS = {"stories15M-q4_0.gguf": "llama.gguf"}


class TestOutcome(msgspec.Struct, frozen=True):
    """The outcome of one test of the suite."""

    __test__ = False  # no class of tests, for pytest

    file: str
    name: str
    outcome: str
    """`passed`, `failed` or `skipped`."""
    reason: str = ""
    """The first line of a failure's message."""


def with_local_model(words: Sequence[str], models: Path) -> list[str]:
    """Returns a command line of the suite with a model file in place of the hub's names."""
    names, others, items = [], [], iter(words)
    for word in items:
        if word in ("--hf-repo", "--hf-file", "--model-url"):
            names.append(next(items))
        else:
            others.append(word)
    if not names:
        return others
    stand_in = next(file for key, file in STAND_INS.items() if any(key in name for name in names))
    return ["--model", str(models / stand_in), *others]


def as_paceline(words: Sequence[str]) -> list[str]:
    """Returns Paceline's command line for one of llama-server.

    The flags are unchanged; per-slot KV is the default, as in llama-server, unless `--kv-unified` is given. Without a
    model llama-server is a router, and Paceline gets a tiny model, since most tests without one are about web pages.
    """
    model = [] if "--model" in words else ["--model", str(MODELS / STAND_INS[""])]
    layout = [] if "--kv-unified" in words else ["--no-kv-unified"]
    return [*model, *words, *layout]


def server_command(server: str, words: Sequence[str]) -> list[str]:
    """Returns the command that runs `server` with a command line of the suite."""
    words = with_local_model(words, MODELS)
    if "--threads" not in words:
        words += ["--threads", "1"]  # more threads are of no use to tiny models
    if server == LLAMA_SERVER:
        return [str(binary(sources(PEERS, pinned()))), *words]
    return [sys.executable, "-m", "api", "serve", "--no-warmup", *as_paceline(words)]


def prepare(tests: Path) -> Path:
    """Creates the environment of the suite, the models and the links to them. Returns the environment's Python."""
    python = SUITE / "env" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(SUITE / "env")], check=True)
        packages = ["-r", str(tests / "requirements.txt"), "pytest-timeout"]
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)
    write_models(MODELS, tests.parents[2])
    (tests / "tmp").mkdir(exist_ok=True)
    for name, stand_in in DOWNLOADS.items():
        link = tests / "tmp" / name
        if not link.exists():
            link.symlink_to(MODELS / stand_in)
    return python


def launcher(server: str) -> Path:
    """Writes the program that the suite starts in place of llama-server, and returns its path."""
    path = SUITE / f"run-{server}"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m bench.peer_suite serve {server} "$@"\n')
    path.chmod(0o755)
    return path


def run_suite(server: str, arguments: Sequence[str]) -> list[TestOutcome]:
    """Runs tests against `server`; `arguments` are those of pytest. Raises SetupError if pytest writes no report."""
    tests = unpack(PEERS, pinned()) / "vendor" / "llama.cpp" / "tools" / "server" / "tests"
    python, report = prepare(tests), SUITE / f"{server}-{os.getpid()}.xml"
    environment = os.environ | {
        "LLAMA_SERVER_BIN_PATH": str(launcher(server)),
        "PORT": str(free_port()),
        "PYTHONPATH": str(_PROJECT),
    }
    options = ["-q", "--tb=short", "-m", "not slow", "-p", "bench.suite_plugin", "-p", "no:cacheprovider"]
    options += [f"--timeout={TEST_SECONDS}", f"--junitxml={report}", "-o", "junit_logging=system-out"]
    subprocess.run([str(python), "-m", "pytest", *options, *arguments], cwd=tests, env=environment, check=False)
    if not report.exists():
        raise SetupError("pytest has written no report")
    outcomes = parse_report(report.read_text("utf-8"))
    report.unlink()
    return outcomes


def parse_report(xml: str) -> list[TestOutcome]:
    """Returns the outcomes in a report of pytest. A test with errors of its fixtures counts once, as failed."""
    outcomes: dict[tuple[str, str], TestOutcome] = {}
    for case in ET.fromstring(xml).iter("testcase"):
        file, name = case.get("classname", "").rpartition(".")[2], case.get("name", "")
        failure = next((found for tag in ("failure", "error") if (found := case.find(tag)) is not None), None)
        if failure is not None:
            output = case.findtext("system-out") or ""
            outcome = TestOutcome(file, name, "failed", _reason(failure.get("message", ""), output))
        else:
            outcome = TestOutcome(file, name, "passed" if case.find("skipped") is None else "skipped")
        if (file, name) not in outcomes or outcomes[file, name].outcome != "failed":
            outcomes[file, name] = outcome
    return list(outcomes.values())


def _reason(message: str, output: str) -> str:
    """Returns the first line of a failure's message; for a server that did not start, the last line that it wrote."""
    first = message.strip().splitlines()[0] if message.strip() else ""
    if "Server process died" in first:
        own = ("tests:", "server pid", "Waiting for", "Response", "Stopping", "---")
        lines = [line for line in output.splitlines() if line.strip() and not line.startswith(own)]
        first = f"the server did not start: {lines[-1].strip()}" if lines else first
    return first[:_REASON_CHARS]


def summary(outcomes: Iterable[TestOutcome]) -> str:
    """Returns a table of the numbers of passed, failed and skipped tests of each file."""
    by_file: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for test in outcomes:
        by_file[test.file][test.outcome] += 1
    total = sum(by_file.values(), Counter())
    kinds = ("passed", "failed", "skipped")
    lines = [f"{'file':32}" + "".join(f"{kind:>9}" for kind in kinds)]
    for file, counts in [*sorted(by_file.items()), ("all", total)]:
        lines.append(f"{file:32}" + "".join(f"{counts[kind]:9}" for kind in kinds))
    return "\n".join(lines)


def comparison(peer: Iterable[TestOutcome], ours: Iterable[TestOutcome]) -> str:
    """Returns the number of tests that pass with llama-server and of those that pass with Paceline too, and a list of
    the tests that fail with Paceline, by file and reason."""
    own = {(test.file, test.name): test for test in ours}
    passing = [(test.file, test.name) for test in peer if test.outcome == "passed"]
    compared = [own[key] for key in passing if key in own]
    failed = [test for test in compared if test.outcome != "passed"]
    counts = f"{len(compared)} of these ran with Paceline, and {len(compared) - len(failed)} of those pass"
    lines = [f"{len(passing)} pass with llama-server; {counts}"]
    reasons: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for test in failed:
        reasons[test.file, test.reason].append(test.name)
    for (file, reason), names in sorted(reasons.items(), key=lambda item: (item[0][0], -len(item[1]))):
        lines += [f"{file}: {len(names)}: {reason}", *(f"    {name}" for name in names)]
    return "\n".join(lines)


def load_outcomes(server: str) -> list[TestOutcome]:
    """Returns the saved outcomes of the last runs. Raises SetupError if there was none."""
    path = SUITE / f"{server}.json"
    if not path.exists():
        raise SetupError(f"there is no run yet: python -m bench.peer_suite {server}")
    return msgspec.json.decode(path.read_bytes(), type=list[TestOutcome])


def save_outcomes(server: str, outcomes: Sequence[TestOutcome]) -> None:
    """Saves outcomes. Those of other tests, from earlier runs, stay."""
    path = SUITE / f"{server}.json"
    earlier = load_outcomes(server) if path.exists() else []
    merged = {(test.file, test.name): test for test in [*earlier, *outcomes]}
    path.write_bytes(msgspec.json.format(msgspec.json.encode(list(merged.values()))))


def main(words: Sequence[str] | None = None) -> None:
    """Runs the suite, compares the last runs, or replaces this process by a server."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "action", choices=[LLAMA_SERVER, PACELINE, "compare"], help="server to test, or compare for the last outcomes"
    )
    words = sys.argv[1:] if words is None else words
    if words[:1] == ["serve"]:  # the suite's own use
        command = server_command(words[1], words[2:])
        os.execv(command[0], command)
    options, rest = parser.parse_known_args(words)
    try:
        if options.action == "compare":
            print(comparison(load_outcomes(LLAMA_SERVER), load_outcomes(PACELINE)))
            return
        outcomes = run_suite(options.action, rest)
        save_outcomes(options.action, outcomes)
        print(summary(outcomes))
    except (SetupError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"\n{error}") from None


if __name__ == "__main__":
    main()
