"""The reasoning budget: once it is spent, the closing tokens are emitted instead of the model's tokens."""

from __future__ import annotations

from collections.abc import Container

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.contract import ReasoningBudget
from engine.sampling import ReasoningLimiter

CLOSING = tuple(b"</t>")


def limited_output(budget: int, model: bytes, *, opens: str = "", forbidden: Container[int] = ()) -> bytes:
    """Returns the output of a model that would emit `model`, one byte per token.

    A grammar forbids the forced token at `forbidden` positions.
    """
    limiter = ReasoningLimiter(ReasoningBudget(budget, opens, "</t>", CLOSING), lambda token: bytes([token]))
    found = bytearray()
    for position, own in enumerate(model):
        forced = limiter.forced
        token = own if forced is None or position in forbidden else forced
        limiter.take(token)
        found.append(token)
    return bytes(found)


def test_reasoning_is_closed_when_the_budget_is_spent() -> None:
    assert limited_output(3, b"abcdefghijklm") == b"abc</t>hijklm"


def test_reasoning_that_ends_in_time_is_unchanged() -> None:
    assert limited_output(9, b"ab</t>cdefghijklm") == b"ab</t>cdefghijklm"


def test_a_budget_of_zero_closes_at_once() -> None:
    assert limited_output(0, b"abcdefg") == b"</t>efg"
    assert limited_output(0, b"<t>abcdefg", opens="<t>") == b"<t></t>efg"


def test_a_character_is_not_cut() -> None:
    assert limited_output(2, "a👩bcdefgh".encode()) == "a👩</t>fgh".encode()


@pytest.mark.parametrize(("late", "found"), [(13, b"</t>efg"), (14, b"abcdefg")])
def test_the_budget_counts_from_the_start_of_the_reasoning(late: int, found: bytes) -> None:
    assert limited_output(2, b"<t>abcdefgh", opens="<t>") == b"<t>ab</t>gh"
    assert limited_output(2, b"abcdefgh" * 4, opens="<t>") == b"abcdefgh" * 4
    assert limited_output(2, b"." * late + b"<t>ababcdefg", opens="<t>") == b"." * late + b"<t>ab" + found


@given(st.integers(0, 12), st.text(min_size=1, max_size=20))
def test_the_output_is_valid_utf8_with_one_end(budget: int, text: str) -> None:
    model = text.replace("<", "").encode() + b"." * 24
    found = limited_output(budget, model)
    assert found.count(b"</t>") == 1
    assert found.partition(b"</t>")[0] == model[: found.index(b"</t>")]
    assert budget <= found.index(b"</t>") <= budget + 3
    found.partition(b"</t>")[0].decode()


def test_bytes_that_are_no_text_are_cut() -> None:
    assert limited_output(2, b"\xf0" * 20).index(b"</t>") == 6


def test_the_end_is_forced_as_soon_as_the_grammar_permits_it() -> None:
    assert limited_output(0, b"abcdefgh", forbidden={0}) == b"a</t>fgh"
    assert limited_output(0, b"abcdefghi", forbidden={2}) == b"</c</t>hi"
    assert limited_output(0, "a👩cdefghijk".encode(), forbidden={0, 1}) == "a👩</t>ghijk".encode()


def test_the_tag_is_emitted_once_even_if_its_continuation_is_forbidden() -> None:
    limiter = ReasoningLimiter(ReasoningBudget(1, "", "</t>", (*CLOSING, 10)), lambda token: bytes([token]))
    for token in b"a</t>":
        limiter.take(token)
    assert limiter.forced == 10
    limiter.take(ord("b"))
    assert limiter.forced is None
    for token in b"cdefgh":
        limiter.take(token)
        assert limiter.forced is None
