"""Build, settings and ratios of llama-server, the peer of the measurements."""

from __future__ import annotations

import io
import shutil
import sys
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bench import peers, prefix, versus
from bench.models import SetupError
from bench.server import HOST

ROOT = Path(__file__).parents[1]
SETTINGS = peers.Settings(model=Path("toy.gguf"), context=4096, slots=8, threads=2)
LLAMA = "vendor/llama.cpp/CMakeLists.txt"


def build_sdist(folder: Path, name: str) -> Path:
    """Writes an sdist with one empty file."""
    path = folder / "toy.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    return path


@dataclass
class FakeSdistIndex:
    """A replacement of pip: builds the requested sdist, and records the request."""

    requested: list[str] = field(default_factory=list)

    def __call__(self, requirement: str, folder: Path) -> Path:
        self.requested.append(requirement)
        return build_sdist(folder, f"llama_cpp_python-{requirement.partition('==')[2]}/{LLAMA}")


def test_the_version_is_the_pinned_one() -> None:
    assert f'"llama-cpp-python=={peers.pinned()}"' in (ROOT / "pyproject.toml").read_text()


def test_the_kernels_have_the_flags_of_the_makefile() -> None:
    assert f"NO_AMX := {' '.join(peers.KERNEL_FLAGS)}\n" in (ROOT / "Makefile").read_text()


def test_builds_are_ignored_by_git() -> None:
    assert peers.PEERS.relative_to(ROOT).parts[0] in (ROOT / ".gitignore").read_text().splitlines()


def test_the_sdist_is_downloaded_once_and_other_files_are_removed(tmp_path: Path) -> None:
    index, folder = FakeSdistIndex(), tmp_path / "peers"
    for _ in range(2):
        source = peers.unpack(folder, "1.2", download=index)
    assert index.requested == ["llama-cpp-python==1.2"]
    assert (source / LLAMA).exists()
    assert list(folder.iterdir()) == [source] == [folder / "llama_cpp_python-1.2"]


def test_a_given_sdist_is_not_downloaded(tmp_path: Path) -> None:
    index, sdist = FakeSdistIndex(), build_sdist(tmp_path, f"llama_cpp_python-1.2/{LLAMA}")
    assert (peers.unpack(tmp_path / "peers", "1.2", sdist, index) / LLAMA).exists()
    assert index.requested == []
    assert sdist.exists()


@pytest.mark.parametrize("name", [f"llama_cpp_python-1.3/{LLAMA}", "llama_cpp_python-1.2/setup.py"])
def test_another_sdist_is_refused_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    sdist = build_sdist(tmp_path, name)
    with pytest.raises(SetupError, match=r"no llama_cpp_python-1\.2/vendor"):
        peers.unpack(tmp_path / "peers", "1.2", sdist)
    assert list((tmp_path / "peers").iterdir()) == []


def test_a_file_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "toy.tar.gz").write_bytes(b"not one")
    with pytest.raises(SetupError, match="cannot be read"):
        peers.unpack(tmp_path / "peers", "1.2", tmp_path / "toy.tar.gz")


def test_only_the_server_is_compiled_and_users_flags_come_last() -> None:
    configure, compiled = peers.commands(Path("toy"), '-DGGML_CUDA=ON -DCMAKE_C_FLAGS="-O2 -g"')
    assert configure[:7] == ["cmake", "-S", "toy/vendor/llama.cpp", "-B", "toy/build", "-G", "Ninja"]
    assert configure[-2:] == ["-DGGML_CUDA=ON", "-DCMAKE_C_FLAGS=-O2 -g"]
    assert compiled[:5] == ["cmake", "--build", "toy/build", "--target", "llama-server"]
    assert peers.binary(Path("toy")) == Path("toy/build/bin/llama-server")


def test_available_tools_are_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/somewhere/{name}")
    monkeypatch.setenv("PATH", "mine")
    assert peers.with_tools(tmp_path)["PATH"] == "mine"
    assert list(tmp_path.iterdir()) == []


def test_tools_from_wheels_come_first_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setenv("PATH", "mine")
    ninja = tmp_path / "tools" / "bin" / "ninja"
    ninja.parent.mkdir(parents=True)
    ninja.touch()
    assert peers.with_tools(tmp_path)["PATH"] == f"{ninja.parent}:mine"


@pytest.mark.parametrize(
    ("line", "counts"),
    [
        ("[15/212] Building CXX object ggml.cpp.o\n", (15, 212)),
        ("[212/212] Linking CXX executable bin/llama-server\n", (212, 212)),
        ("ninja: no work to do.\n", None),
        ("-- x [1/2] y\n", None),
    ],
)
def test_the_counter_of_ninja_is_parsed(line: str, counts: tuple[int, int] | None) -> None:
    assert peers.parse_ninja_counts(line) == counts


def test_progress_is_reported_and_all_output_is_logged(tmp_path: Path) -> None:
    counts, log = list[tuple[int, int]](), tmp_path / "log"
    script = "print('[1/2] first'); print('a warning'); print('[2/2] second')"
    peers.run_logged([sys.executable, "-c", script], {}, log, lambda done, total: counts.append((done, total)))
    assert counts == [(1, 2), (2, 2)]
    assert log.read_text() == "[1/2] first\na warning\n[2/2] second\n"


def test_the_error_of_a_failed_command_has_the_last_lines_of_output(tmp_path: Path) -> None:
    script = "import sys; print('no compiler'); sys.exit(3)"
    with pytest.raises(SetupError, match=r"no compiler\n.* failed; its output is in .*log"):
        peers.run_logged([sys.executable, "-c", script], {}, tmp_path / "log", lambda done, total: None)


def test_elsewhere_than_on_a_terminal_each_tenth_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    for done in range(1, 41):
        peers.show_steps(done, 40)
    assert capsys.readouterr().out.splitlines() == [f"  compiled {done}/40" for done in range(4, 41, 4)]


def test_both_servers_have_equal_settings() -> None:
    common = ["-c", "4096", "-np", "8", "-t", "2", "-tb", "2"]
    assert SETTINGS.common() == common
    line = peers.command_line(Path("bin/llama-server"), SETTINGS, 1234, ("--kv-unified",))
    assert line[:7] == ["bin/llama-server", "-m", "toy.gguf", "--host", HOST, "--port", "1234"]
    assert line[-11:] == [*common, "-fa", "off", "--kv-unified"]


def test_paceline_chooses_flash_attention_and_the_layout_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    served = list[tuple[Path, list[str]]]()
    monkeypatch.setattr(peers, "serving", lambda model, flags: served.append((model, flags)))
    peers.started("paceline", SETTINGS)
    assert served == [(SETTINGS.model, SETTINGS.common())]


def test_the_flags_of_a_mode_come_last() -> None:
    mode = peers.MODES["llama-server-split-flash"]
    line = peers.command_line(Path("bin/llama-server"), SETTINGS, 1234, mode)
    assert line[-5:] == ["-fa", "off", "--no-kv-unified", "-fa", "on"]


def test_the_error_of_a_missing_build_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "PEERS", tmp_path)
    with (
        pytest.raises(SetupError, match=r"python -m bench\.peers build"),
        peers.started("llama-server-split", SETTINGS),
    ):
        raise AssertionError("it started")


def test_the_error_of_a_failed_start_has_the_last_lines_of_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "PEERS", tmp_path)
    program = peers.binary(peers.sources(tmp_path, peers.pinned()))
    program.parent.mkdir(parents=True)
    program.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('no such model')\n")
    program.chmod(0o700)
    with (
        pytest.raises(RuntimeError, match=r"exit code 1\)\nno such model"),
        peers.started("llama-server-unified", SETTINGS),
    ):
        raise AssertionError("it started")


def test_rounds_share_no_prompt_and_requests_of_a_round_do() -> None:
    (first, second), (other, _) = (prefix.questions(number, 2000, 2, 32) for number in range(2))
    assert first["messages"][0] == second["messages"][0] != other["messages"][0]
    assert first["messages"][1] != second["messages"][1]
    assert (first["temperature"], first["max_tokens"], first["ignore_eos"]) == (0, 32, True)


def test_ratios_are_of_the_same_round_and_the_best_peer_counts() -> None:
    seconds = {
        "paceline": [1.0, 2.0, 4.0],
        "llama-server-split": [3.0, 6.0, 4.0],
        "llama-server-unified": [5.0, 5.0, 9],
    }
    turns: dict[str, list[prefix.ServerFigures]] = {
        name: [{"seconds": one} for one in all] for name, all in seconds.items()
    }
    assert prefix.ratios(turns) == {"paceline": 1.0, "llama-server-split": 3.0, "llama-server-unified": 2.5}
    assert prefix.best_peer(turns) == "llama-server-split"
    del turns["paceline"]
    assert prefix.ratios(turns) == {}
    assert prefix.best_peer({}) == ""


def compared_rounds(speed: float, gap: float, first: float) -> list[dict[str, Any]]:
    """Returns three rounds; the last round has half the speed of the others."""
    return [
        {
            "tokens_per_second": speed / factor,
            "gap_ms": {"p99": gap * factor},
            "ttft_ms": {"p50": first * factor, "p99": 2 * first * factor},
            "finish_s": {"max": 100 / speed * factor},
        }
        for factor in (1, 1, 2)
    ]


def test_ratios_are_of_medians_to_the_fastest_mode_and_to_the_best_for_a_figure() -> None:
    table = versus.ratio_rows(
        {
            peers.PACELINE: compared_rounds(30.0, 10.0, 300.0),
            "llama-server-split": compared_rounds(20.0, 80.0, 200.0),
            "llama-server-unified": compared_rounds(10.0, 40.0, 400.0),
            "bound": [],
        }
    )
    found = {(title, mode): (ours, theirs, ratio) for title, ours, theirs, mode, ratio, _ in table}
    assert found == {
        ("tokens/s", "split (fastest)"): (30.0, 20.0, 1.5),
        ("gap p99", "split (fastest)"): (10.0, 80.0, 0.125),
        ("gap p99", "unified (best here)"): (10.0, 40.0, 0.25),
        ("time to first token p50", "split (fastest)"): (300.0, 200.0, 1.5),
        ("time to first token p99", "split (fastest)"): (600.0, 400.0, 1.5),
        ("end of the last request", "split (fastest)"): (100 / 30, 5.0, pytest.approx(2 / 3)),
    }
    assert {within for *_, within in table if str(within).startswith("1.50")} == {"1.50 (1.50–1.50)"}
    assert versus.ratio_rows({peers.PACELINE: compared_rounds(30.0, 10.0, 300.0)}) == []


def test_the_table_has_a_row_for_each_contender_that_ran() -> None:
    rounds = {
        peers.PACELINE: compared_rounds(30.0, 10.0, 300.0),
        "bound": [{"tokens_per_second": 60.0}] * 3,
        "none": [],
    }
    first, second = versus.rows(rounds)
    assert first[:6] == [peers.PACELINE, 30.0, 1.0, "", 10, 300]
    assert second == ["bound", 60.0, 2.0, *[""] * (len(versus.COLUMNS) - 3)]
