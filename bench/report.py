"""Writes a Markdown report, with plots, of all result files in a folder: `python -m bench.report [FOLDER]`.

A ratio compares runs of one round. The report has the median over the rounds with the smallest and the largest value.
`--readme` also replaces the table in `bench/README.md`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from bench.example import EXAMPLE
from bench.figures import OUT, figure, markdown, plot, ratios
from bench.peers import PACELINE

# The content of a result file: `figures` with machine, versions, date and command.
SavedRun = dict[str, Any]

MARKS = ("<!-- results: python -m bench.report --readme -->", "<!-- end of results -->")
BOUND = "bound"


def read(folder: Path) -> dict[str, SavedRun]:
    """Returns the runs of a folder by file name; other JSON files are skipped."""
    runs: dict[str, SavedRun] = {}
    for path in sorted(folder.glob("*.json")):
        found = msgspec.json.decode(path.read_bytes())
        if isinstance(found, dict) and "figures" in found:
            runs[path.stem] = found
    return runs


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Returns the median, followed by minimum and maximum if there are several values."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def best(rounds: dict[str, list[SavedRun]], path: str, *, smallest: bool = False) -> str:
    """Returns llama-server's mode with the largest median of a figure, or the smallest if `smallest`; empty without a
    mode."""
    modes = {
        name: median(figure(run, path) for run in runs) for name, runs in rounds.items() if name.startswith("llama-s")
    }
    return (min if smallest else max)(modes, key=modes.__getitem__, default="")


# ── sections ──


def versus(run: SavedRun, file: str) -> str:
    """Returns throughput and gaps of each server by number of clients."""
    figures = run["figures"]
    rows: list[list[object]] = []
    lines: dict[str, list[tuple[float, float]]] = {}
    gaps: dict[str, list[tuple[float, float]]] = {}
    for clients, rounds in figures["cells"].items():
        for name, runs in rounds.items():
            if not runs:
                continue
            speeds = [figure(turn, "tokens_per_second") for turn in runs]
            late = [figure(turn, "gap_ms.p99") for turn in runs]
            share = ratios(rounds[PACELINE], runs, "tokens_per_second")
            row = [clients, name, spread(speeds, 1), spread(share)]
            if name != BOUND:
                gaps.setdefault(name, []).append((int(clients), median(late)))
                row += [
                    spread(late, 0),
                    spread(ratios(rounds[PACELINE], runs, "gap_ms.p99")),
                    figure(runs[-1], "resident_mib"),
                ]
            rows.append(row + [""] * (7 - len(row)))
            lines.setdefault(name, []).append((int(clients), median(speeds)))
    plot(f"{file}_speed", "tokens per second", "clients", "tokens per second", lines)
    plot(f"{file}_gaps", "99th percentile of gaps", "clients", "milliseconds", gaps)
    columns = ("clients", "", "tokens/s", "ratio", "gap p99, ms", "ratio", "MiB")
    started = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in figures["options"]["start"].items())
    about = f"Workload: {figures['options']['workload']}. Ready after: {started}. Ratios: Paceline to the server."
    return f"{about}\n\n{markdown(columns, rows)}\n![]({file}_speed.png) ![]({file}_gaps.png)\n"


def stall(run: SavedRun, file: str) -> str:
    """Returns the gaps of four streams during the prefill of a long prompt."""
    rounds = run["figures"]["cells"]["stall"]
    largest, medians = "largest_gap_during_prefill_ms", "median_gap_before_ms"
    rows = [
        [
            name,
            spread([figure(turn, medians) for turn in runs], 0),
            spread([figure(turn, largest) for turn in runs], 0),
            spread(ratios(rounds[PACELINE], runs, largest)),
            spread([figure(turn, "prompt_seconds") for turn in runs], 1),
        ]
        for name, runs in rounds.items()
    ]
    columns = ("", "median gap before, ms", "largest gap, ms", "Paceline's to the server's", "prefill, s")
    return markdown(columns, rows)


def prefix(run: SavedRun, file: str) -> str:
    """Returns the medians of many requests with one system prompt."""
    medians = run["figures"]["medians"]
    paths = ("seconds", "against_paceline", "prompt_tokens_computed", "ttft_p50_ms")
    rows = [[name, *(figure(figures, path) for path in paths)] for name, figures in medians.items()]
    return markdown(("", *(path.replace("_", " ") for path in paths)), rows)


def grid(run: SavedRun, file: str) -> str:
    """Returns the ratio of each proposer to no speculation, by workload and number of clients."""
    rows = [
        [workload, clients, setting, spread([figure(turn, "ratio") for turn in runs])]
        for workload, by_clients in run["figures"]["cells"].items()
        for clients, by_setting in by_clients.items()
        for setting, runs in by_setting.items()
        if setting != "none"
    ]
    return markdown(("workload", "clients", "setting", "tokens/s to none"), rows)


def table(run: SavedRun, file: str) -> str:
    """Returns the rows of a run, which have equal fields, as a table."""
    rows = run["figures"]
    return markdown([column.replace("_", " ") for column in rows[0]], [[*row.values()] for row in rows])


# The beginning of the file's name, the title, and the function that renders the section.
_SECTIONS: tuple[tuple[str, str, Callable[[SavedRun, str], str]], ...] = (
    ("versus", "Side by side", versus),
    ("stall", "A long prompt beside four streams", stall),
    ("prefix", "One system prompt for many requests", prefix),
    ("grid", "Speculative decoding", grid),
    ("limits", "A model that computes nothing", table),
)


def section(name: str, run: SavedRun) -> str:
    """Returns the section of one run; empty if no section is defined for the name."""
    for begins, title, render in _SECTIONS:
        if name == begins or name.startswith(f"{begins}_"):
            machine, versions = run["machine"], run.get("versions", {})
            model = run["figures"].get("model", "") if isinstance(run["figures"], dict) else ""
            about = [model, f"{machine['processor']}, {machine['cores']} cores", run.get("date", "")]
            about += [f"{package} {number}" for package, number in versions.items()]
            source = f"`{run.get('command', '')}`  \n{' · '.join(filter(None, about))}"
            return f"## {title} ({name})\n\n{source}\n\n{render(run, name)}\n"
    return ""


# ── the table of bench/README.md ──


def headline(runs: dict[str, SavedRun]) -> str:
    """Returns the table of Paceline's ratios to llama-server's best mode, to the example server and to the bound."""
    rows: list[list[object]] = []
    if "versus" in runs:
        for clients, rounds in runs["versus"]["figures"]["cells"].items():
            load = f"{clients} client{'s' if clients != '1' else ''}"
            rows += _against(f"tokens per second, {load}", rounds, "tokens_per_second", smallest=False)
            rows += _against(f"99th percentile of gaps, {load}", rounds, "gap_ms.p99", smallest=True)
    if "stall" in runs:
        rounds = runs["stall"]["figures"]["cells"]["stall"]
        rows += _against("largest gap during a long prefill", rounds, "largest_gap_during_prefill_ms", smallest=True)
    return markdown(
        ("ratio of Paceline to", "llama-server, best mode", "llama-cpp-python's example", "the bound"), rows
    )


def _against(title: str, rounds: dict[str, list[SavedRun]], path: str, *, smallest: bool) -> list[list[object]]:
    names = (best(rounds, path, smallest=smallest), EXAMPLE, BOUND)
    cells = [
        spread(found) if name in rounds and (found := ratios(rounds[PACELINE], rounds[name], path)) else ""
        for name in names
    ]
    return [[title, *cells]] if any(cells) else []


def replace_table(readme: Path, text: str) -> None:
    """Replaces the text between MARKS in a file. Raises ValueError if the file lacks a mark."""
    whole = readme.read_text()
    before, after = whole.index(MARKS[0]) + len(MARKS[0]), whole.index(MARKS[1])
    readme.write_text(f"{whole[:before]}\n\n{text}\n{whole[after:]}")


def main() -> None:
    """Writes `report.md` and its plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=OUT, help="folder of the result files")
    parser.add_argument("--readme", type=Path, nargs="?", const=Path("bench/README.md"), help="also replace its table")
    options = parser.parse_args()
    runs = read(options.folder)
    sections = [text for name, run in runs.items() if (text := section(name, run))]
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / "report.md"
    path.write_text("\n".join(["# Measurements\n", *sections]))
    print(f"wrote {path}")
    if options.readme is not None:
        replace_table(options.readme, headline(runs))


if __name__ == "__main__":
    main()
