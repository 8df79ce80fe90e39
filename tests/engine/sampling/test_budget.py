"""The bound on reasoning: when it is spent, what closes reasoning is emitted, whatever the model would say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.contract import ReasoningBudget, Request, SamplingParams
from engine.sampling import Sampler

CLOSING = tuple(b"</t>")


def written(budget: int, model: bytes, *, opens: str = "", prompt: bytes = b"?") -> bytes:
    """What is emitted if the model would write `model`, a byte a token."""
    bound = ReasoningBudget(budget, opens, "</t>", CLOSING)
    request = Request(prompt=tuple(prompt), sampling=SamplingParams(temperature=0), reasoning=bound)
    sampler = Sampler(request, 1, frozenset(), lambda token: bytes([token]))
    history = list(prompt)
    while len(history) - len(prompt) < len(model):
        row = np.zeros(256, np.float32)
        row[model[len(history) - len(prompt)]] = 1.0
        history.append(sampler.pick(row, history, len(prompt)))
    return bytes(history[len(prompt) :])


def test_it_is_closed_when_the_budget_is_spent() -> None:
    assert written(3, b"abcdefghijklm") == b"abc</t>hijklm"


def test_what_ends_in_time_is_left_alone() -> None:
    assert written(9, b"ab</t>cdefghijklm") == b"ab</t>cdefghijklm"


def test_a_budget_of_none_closes_at_once() -> None:
    assert written(0, b"abcdefg") == b"</t>efg"


def test_a_character_is_not_cut() -> None:
    assert written(2, "a👩bcdefgh".encode()) == "a👩</t>fgh".encode()


def test_it_counts_from_where_reasoning_begins() -> None:
    assert written(2, b"<t>abcdefgh", opens="<t>") == b"<t>ab</t>gh"
    assert written(2, b"abcdefgh", opens="<t>") == b"abcdefgh"


@given(st.integers(0, 12), st.text(min_size=1, max_size=20))
def test_what_was_emitted_is_whole_text_with_one_end(budget: int, text: str) -> None:
    model = text.replace("<", "").encode() + b"." * 24
    found = written(budget, model)
    assert found.count(b"</t>") == 1
    assert found.partition(b"</t>")[0] == model[: found.index(b"</t>")]
    assert budget <= found.index(b"</t>") <= budget + 3
    found.partition(b"</t>")[0].decode()


@pytest.mark.parametrize("forgotten", [1, 5])
def test_it_is_no_matter_to_who_forgot_something(forgotten: int) -> None:
    bound = ReasoningBudget(0, "", "</t>", CLOSING)
    request = Request(prompt=(1,), sampling=SamplingParams(temperature=0), reasoning=bound)
    sampler = Sampler(request, 1, frozenset(), lambda token: bytes([token]))
    row = np.zeros(256, np.float32)
    row[7] = 1.0
    assert sampler.pick(row, [1, 2, 3], 1, forgotten) == 7


def test_where_a_grammar_forbids_it_the_model_goes_on() -> None:
    bound = ReasoningBudget(0, "", "</t>", CLOSING)
    request = Request(prompt=(1,), sampling=SamplingParams(temperature=0), reasoning=bound)
    sampler = Sampler(request, 1, frozenset(), lambda token: bytes([token]))
    row = np.zeros(256, np.float32)
    row[7] = 1.0
    permitted = np.ones(256, np.bool_)
    assert sampler.pick(row, [1], 1, 0, permitted) == CLOSING[0]
    permitted[CLOSING[0]] = False
    assert sampler.pick(row, [1], 1, 0, permitted) == 7
