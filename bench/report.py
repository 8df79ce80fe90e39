"""One Markdown report of what was measured: `python -m bench.report [FOLDER]`, with plots beside it.

It reads the JSON files that the other commands wrote. A ratio compares runs of one round, medians over rounds count,
the spread stands beside them, and no absolute figure stands alone. `--readme` also renews the table in the README.
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

Run = dict[str, Any]
"""What one command wrote: `figures`, and what they were measured with."""

MARKS = ("<!-- results: python -m bench.report --readme -->", "<!-- end of results -->")
BOUND = "bound"


def read(folder: Path) -> dict[str, Run]:
    """The runs by name; files that are no such are left out."""
    runs: dict[str, Run] = {}
    for path in sorted(folder.glob("*.json")):
        found = msgspec.json.decode(path.read_bytes())
        if isinstance(found, dict) and "figures" in found:
            runs[path.stem] = found
    return runs


def spread(values: Sequence[float], digits: int = 2) -> str:
    """The median, and the least and the greatest."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def best(rounds: dict[str, list[Run]], path: str, *, least: bool = False) -> str:
    """Of llama-server's modes the one that is best by a figure; empty if none ran."""
    modes = {
        name: median(figure(of, path) for of in runs) for name, runs in rounds.items() if name.startswith("llama-s")
    }
    return (min if least else max)(modes, key=modes.__getitem__, default="")


# ── sections ──


def versus(run: Run, name: str) -> str:
    """Throughput and gaps by clients, side by side."""
    figures = run["figures"]
    rows: list[list[object]] = []
    lines: dict[str, list[tuple[float, float]]] = {}
    gaps: dict[str, list[tuple[float, float]]] = {}
    for clients, rounds in figures["cells"].items():
        for who, runs in rounds.items():
            if not runs:
                continue
            speeds, late = [figure(of, "tokens_per_second") for of in runs], [figure(of, "gap_ms.p99") for of in runs]
            share = ratios(rounds[PACELINE], runs, "tokens_per_second")
            row = [clients, who, spread(speeds, 1), spread(share)]
            if who != BOUND:
                gaps.setdefault(who, []).append((int(clients), median(late)))
                row += [
                    spread(late, 0),
                    spread(ratios(rounds[PACELINE], runs, "gap_ms.p99")),
                    figure(runs[-1], "resident_mib"),
                ]
            rows.append(row + [""] * (7 - len(row)))
            lines.setdefault(who, []).append((int(clients), median(speeds)))
    plot(f"{name}_speed", "tokens a second", "clients", "tokens a second", lines)
    plot(f"{name}_gaps", "99th percentile of the gap between texts", "clients", "milliseconds", gaps)
    columns = ("clients", "", "tokens/s", "Paceline's to it", "gap p99, ms", "Paceline's to it", "MiB")
    started = ", ".join(f"{who} {seconds:.1f} s" for who, seconds in figures["options"]["start"].items())
    what = f"Workload: {figures['options']['workload']}. Ready after: {started}."
    return f"{what}\n\n{markdown(columns, rows)}\n![]({name}_speed.png) ![]({name}_gaps.png)\n"


def stall(run: Run, name: str) -> str:
    """Gaps of four streams while a long prompt is read."""
    rounds = run["figures"]["cells"]["stall"]
    largest, medians = "largest_gap_while_reading_ms", "median_gap_before_ms"
    rows = [
        [
            who,
            spread([figure(of, medians) for of in runs], 0),
            spread([figure(of, largest) for of in runs], 0),
            spread(ratios(rounds[PACELINE], runs, largest)),
            spread([figure(of, "prompt_seconds") for of in runs], 1),
        ]
        for who, runs in rounds.items()
    ]
    columns = ("", "gap before, ms", "largest gap, ms", "Paceline's to it", "prompt read in, s")
    return markdown(columns, rows)


def prefix(run: Run, name: str) -> str:
    """One system prompt for many requests."""
    figures = run["figures"]
    paths = ("seconds", "against_paceline", "prompt_tokens_computed", "ttft_p50_ms")
    rows = [[who, *(figure(of, path) for path in paths)] for who, of in figures["medians"].items()]
    return markdown(("", *(path.replace("_", " ") for path in paths)), rows)


def grid(run: Run, name: str) -> str:
    """Proposers by workload by clients, against none."""
    rows = [
        [workload, clients, setting, spread([figure(of, "ratio") for of in runs])]
        for workload, by_clients in run["figures"]["cells"].items()
        for clients, by_setting in by_clients.items()
        for setting, runs in by_setting.items()
        if setting != "none"
    ]
    return markdown(("workload", "clients", "setting", "tokens/s to none"), rows)


def table(run: Run, name: str) -> str:
    """Rows of figures with equal names."""
    rows = run["figures"]
    return markdown([column.replace("_", " ") for column in rows[0]], [[*row.values()] for row in rows])


SECTIONS: tuple[tuple[str, str, Callable[[Run, str], str]], ...] = (
    ("versus", "Side by side", versus),
    ("stall", "A long prompt beside four streams", stall),
    ("prefix", "One system prompt for many requests", prefix),
    ("grid", "Guessing ahead", grid),
    ("limits", "A model that computes nothing", table),
)
"""The beginning of the file's name, the title, and what makes the text of it."""


def section(name: str, run: Run) -> str:
    """What is said of one run; empty if nothing is known of its kind."""
    for begins, title, text in SECTIONS:
        if name == begins or name.startswith(f"{begins}_"):
            machine, versions = run["machine"], run.get("versions", {})
            model = run["figures"].get("model", "") if isinstance(run["figures"], dict) else ""
            about = [model, f"{machine['processor']}, {machine['cores']} cores", run.get("date", "")]
            about += [f"{package} {number}" for package, number in versions.items()]
            made = f"`{run.get('command', '')}`  \n{' · '.join(filter(None, about))}"
            return f"## {title} ({name})\n\n{made}\n\n{text(run, name)}\n"
    return ""


# ── the README's table ──


def headline(runs: dict[str, Run]) -> str:
    """What the README shows of it: against the best mode of llama-server, and against the example server."""
    rows: list[list[object]] = []
    if "versus" in runs:
        for clients, rounds in runs["versus"]["figures"]["cells"].items():
            whose = f"{clients} client{'s' if clients != '1' else ''}"
            rows += _against(f"tokens a second, {whose}", rounds, "tokens_per_second", least=False)
            rows += _against(f"99th percentile of gaps, {whose}", rounds, "gap_ms.p99", least=True)
    if "stall" in runs:
        rounds = runs["stall"]["figures"]["cells"]["stall"]
        rows += _against("largest gap while a long prompt is read", rounds, "largest_gap_while_reading_ms", least=True)
    return markdown(
        ("Paceline's, of that of", "llama-server, best mode", "llama-cpp-python's example", "the bound"), rows
    )


def _against(what: str, rounds: dict[str, list[Run]], path: str, *, least: bool) -> list[list[object]]:
    names = (best(rounds, path, least=least), EXAMPLE, BOUND)
    cells = [
        spread(found) if name in rounds and (found := ratios(rounds[PACELINE], rounds[name], path)) else ""
        for name in names
    ]
    return [[what, *cells]] if any(cells) else []


def renew(readme: Path, text: str) -> None:
    """Puts `text` between the marks. Raises ValueError if they are not there."""
    whole = readme.read_text()
    before, after = whole.index(MARKS[0]) + len(MARKS[0]), whole.index(MARKS[1])
    readme.write_text(f"{whole[:before]}\n\n{text}\n{whole[after:]}")


def main() -> None:
    """Writes `report.md` and its plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=OUT, help="where the JSON files are")
    parser.add_argument("--readme", type=Path, nargs="?", const=Path("README.md"), help="renew the table in it too")
    options = parser.parse_args()
    runs = read(options.folder)
    sections = [text for name, run in runs.items() if (text := section(name, run))]
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / "report.md"
    path.write_text("\n".join(["# Measured\n", *sections]))
    print(f"wrote {path}")
    if options.readme is not None:
        renew(options.readme, headline(runs))


if __name__ == "__main__":
    main()
