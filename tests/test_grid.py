"""The measurements of speculation: settings, and the replay in virtual time."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from bench.figures import markdown
from bench.grid import speculation
from bench.outputs import RecordedRequest
from bench.replay import replay
from bench.simulated import NoVocabulary
from engine import Calibration, Speculation

FLAT = Calibration({1: 1.0, 16: 1.01, 128: 1.1}, 0.0, 0.01)
LINEAR = Calibration({1: 1.0, 128: 128.0}, 0.0, 0.01)
VOCABULARY: Any = NoVocabulary()
COPY = [RecordedRequest(tuple(range(1, 200)), (), tuple(range(1, 100))) for _ in range(4)]
NEW = [RecordedRequest((1, 2, 3), (), tuple(range(10 * start, 10 * start + 60))) for start in range(1, 80, 10)]
AUTO, NONE = Speculation(type=("auto",)), Speculation()


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("none", NONE),
        ("auto", AUTO),
        ("suffix", Speculation(type=("suffix",))),
        ("draft:8", Speculation(type=("draft",), n_max=8, order="fixed")),
        ("synthetic:0.8", AUTO),
    ],
)
def test_the_speculation_of_a_setting(setting: str, expected: Speculation) -> None:
    assert speculation(setting) == expected


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError):
        speculation("sufix:8")


@pytest.mark.parametrize("clients", [1, 3])
def test_a_replay_yields_all_tokens_and_is_faster_where_rows_are_free(clients: int) -> None:
    none = replay(COPY, FLAT, clients, NONE, VOCABULARY, 99)
    auto = replay(COPY, FLAT, clients, AUTO, VOCABULARY, 99)
    assert none.tokens == auto.tokens == 4 * 99
    assert sum(none.drafted) == 0
    assert auto.rate > 2 * none.rate


@pytest.mark.parametrize("recorded", [COPY, NEW])
@pytest.mark.parametrize("clients", [1, 3])
def test_a_replay_is_not_slower_where_every_row_costs_the_same(recorded: list[RecordedRequest], clients: int) -> None:
    none = replay(recorded, LINEAR, clients, NONE, VOCABULARY, 60)
    auto = replay(recorded, LINEAR, clients, AUTO, VOCABULARY, 60)
    assert auto.rate > 0.98 * none.rate


def test_a_table_as_markdown() -> None:
    assert markdown(("a", "b"), [["x", 1.234], ["y", 2]]) == "| a | b |\n| --- | --: |\n| x | 1.23 |\n| y | 2 |\n"
