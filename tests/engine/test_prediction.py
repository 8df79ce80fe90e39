"""The `prediction` proposer against its contract, written down with lists and scans of them."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.speculate.prediction import AHEAD, NEAR, SYNC_LONG, SYNC_SHORT, Prediction

Operation = tuple[str, int, int, list[int]]
"""Name, two numbers and tokens."""


class Naive:
    """Keeps the history, and reads the whole output again for every draft."""

    def __init__(self, predicted: list[int], prompt_length: int) -> None:
        self.predicted, self.prompt_length = predicted, prompt_length
        self.history: list[int] = []

    def shift(self, keep: int, discard: int) -> None:
        self.prompt_length -= sum(keep <= place < keep + discard for place in range(self.prompt_length))
        self.history = self.history[:keep] + self.history[keep + discard :]

    def agreed(self, output: list[int], place: int) -> int:
        most = min(place, len(output), SYNC_LONG)
        return next(n for n in range(most, -1, -1) if self.predicted[place - n : place] == output[len(output) - n :])

    def found(self, output: list[int], old: int) -> int | None:
        last, ends = output[-SYNC_SHORT:], range(SYNC_SHORT, len(self.predicted) + 1)
        places = [end for end in ends if self.predicted[end - SYNC_SHORT : end] == last]
        later = [place for place in places if old <= place <= old + AHEAD][:NEAR]
        before = [place for place in places if place < old][-NEAR:]
        longest = max((self.agreed(output, place) for place in later + before), default=0)
        by_preference = later + before[::-1]
        return next((place for place in by_preference if self.agreed(output, place) == longest), None)

    def propose(self, limit: int) -> list[int]:
        output = self.history[self.prompt_length :]
        place = misses = 0
        for end, token in enumerate(output, 1):
            if self.predicted[place : place + 1] == [token]:
                place, misses = place + 1, 0
            elif (found := self.found(output[:end], place)) is not None:
                place, misses = found, 0
            else:
                misses += 1
                place += misses == 1
        return self.predicted[place : place + limit] if misses < 2 else []


def operations(drawn: bytes) -> list[Operation]:
    """Nine bytes each: drawing them at once is several times as fast as drawing every part."""
    names = ["observe"] * 6 + ["copy"] * 6 + ["truncate", "shift"]
    return [
        (names[name % 14], first % 40, second % 12, [token % 3 for token in tokens[: 1 + size % 5]])
        for name, first, second, size, *tokens in zip(*[iter(drawn)] * 9, strict=False)
    ]


PREDICTED = st.lists(st.integers(0, 2), max_size=30)


@settings(max_examples=300, deadline=None)
@given(PREDICTED, st.integers(0, 6), st.binary(min_size=315, max_size=450).map(operations))
def test_equals_the_naive_one(predicted: list[int], prompt_length: int, operations: list[Operation]) -> None:
    prediction, naive = Prediction(predicted, prompt_length), Naive(predicted, prompt_length)
    prediction.begin([])
    for name, first, second, tokens in operations:
        length = len(naive.history)
        match name:
            case "observe" | "copy":
                tokens = tokens if name == "observe" else predicted[first : first + second]
                prediction.observe(tokens)
                naive.history += tokens
            case "truncate":
                prediction.truncate(min(first, length))
                naive.shift(min(first, length), max(0, length - first))
            case "shift":
                keep = min(first, length)
                discard = min(second, length - keep)
                prediction.shift(keep, discard)
                naive.shift(keep, discard)
        limit = 1 + second
        assert list(prediction.propose(limit).tokens) == naive.propose(limit)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 1), min_size=150, max_size=250), st.lists(st.integers(0, 1), max_size=60))
def test_equals_the_naive_one_where_places_abound(predicted: list[int], output: list[int]) -> None:
    prediction, naive = Prediction(predicted, 0), Naive(predicted, 0)
    for i in range(len(output)):
        prediction.observe(output[i : i + 1])
    naive.history = output
    assert list(prediction.propose(8).tokens) == naive.propose(8)


def spelled(text: str) -> list[int]:
    """A token for each word, sign or run of blanks."""
    return [sum(ord(char) << 8 * place for place, char in enumerate(word)) for word in re.findall(r"\w+|\s+|.", text)]


def steps(predicted: str, output: str, limit: int = 16) -> tuple[int, int]:
    """How many steps the output takes, and how many of its tokens are drafts that were right."""
    prediction, tokens = Prediction(spelled(predicted), 0), spelled(output)
    prediction.begin([])
    count = right = done = 0
    while done < len(tokens):
        draft = list(prediction.propose(limit).tokens)
        accepted = next((i for i, token in enumerate(draft) if tokens[done + i : done + i + 1] != [token]), len(draft))
        prediction.observe(tokens[done : done + accepted + 1], len(draft), accepted)
        done, right, count = done + accepted + 1, right + accepted, count + 1
    return count, right


CODE = "\n".join(f"    total{i} = old + step({i}, old)\n    check(total{i}, limit={i * 7})" for i in range(12))
LENGTH = len(spelled(CODE))


def test_the_predicted_text_takes_a_step_for_each_draft() -> None:
    assert steps(CODE, CODE) == (-(-LENGTH // 17), LENGTH - LENGTH // 17)


def test_a_renamed_variable_costs_a_step_for_each_use() -> None:
    count, _ = steps(CODE, CODE.replace("old", "new"), limit=64)
    assert count <= 2 * 12 + 2


def test_a_name_that_becomes_two_tokens_costs_four_steps() -> None:
    count, _ = steps(CODE, CODE.replace("old", "new.er"), limit=64)
    assert count <= 2 * 12 * 4 + 2


def test_inserted_lines_are_passed() -> None:
    lines = CODE.split("\n")
    output = "\n".join([*lines[:8], "    print(1)", "    return early", *lines[8:]])
    count, right = steps(CODE, output, limit=64)
    assert right >= LENGTH - 12
    assert count <= 30


def test_deleted_lines_are_skipped() -> None:
    lines = CODE.split("\n")
    count, right = steps(CODE, "\n".join(lines[:6] + lines[10:]), limit=64)
    assert right >= LENGTH * 20 // 24 - 12
    assert count <= 12


def test_the_prompt_is_not_followed() -> None:
    prediction = Prediction([1, 2, 3, 4], 3)
    prediction.begin([1, 2])
    prediction.observe([1])
    assert prediction.propose(2).tokens == [1, 2]
    prediction.observe([1])
    assert prediction.propose(9).tokens == [2, 3, 4]


def test_a_draft_has_at_most_n_max_tokens() -> None:
    prediction = Prediction(list(range(9)), 0, n_max=3)
    prediction.begin([])
    assert prediction.propose(9).tokens == [0, 1, 2]


def test_one_token_may_be_replaced_two_are_a_way_off() -> None:
    prediction = Prediction([1, 2, 3, 4, 5], 0)
    prediction.begin([1, 9])
    assert prediction.propose(9).tokens == [3, 4, 5]
    prediction.observe([9])
    assert prediction.propose(9).tokens == ()
    prediction.observe([3])
    assert prediction.propose(9).tokens == [4, 5]


def test_the_place_is_found_again_by_two_tokens() -> None:
    prediction = Prediction([1, 2, 3, 4, 5, 6, 7], 0)
    prediction.begin([1, 9, 9, 5])
    assert prediction.propose(9).tokens == ()
    prediction.observe([6])
    assert prediction.propose(9).tokens == [7]


@pytest.mark.parametrize(("keep", "discard"), [(3, 2), (0, 4), (1, 3)])
def test_an_edit_takes_the_place_back(keep: int, discard: int) -> None:
    edited, fresh = Prediction([3, 2, 3, 4, 5], 2), Prediction([3, 2, 3, 4, 5], 2 - max(0, 2 - keep))
    edited.begin([8, 8, 3, 2, 3])
    edited.shift(keep, discard)
    fresh.begin([8, 8, 3, 2, 3][:keep] + [8, 8, 3, 2, 3][keep + discard :])
    assert edited.propose(9).tokens == fresh.propose(9).tokens == [2, 3, 4, 5]


@pytest.mark.parametrize(("repeats", "expected"), [(NEAR - 3, [3]), (NEAR - 2, [9])])
def test_so_many_places_are_compared(repeats: int, expected: list[int]) -> None:
    """The best place is the last of `repeats` + 3; the old one is the first."""
    prediction = Prediction([8, 2, 2, 9] + [2, 2, 4] * repeats + [2, 2, 2, 3], 0)
    prediction.begin([8, 2, 2, 2])
    assert prediction.propose(1).tokens == expected


@pytest.mark.parametrize(("last", "expected"), [(AHEAD, [AHEAD + 1]), (AHEAD + 1, [])])
def test_the_place_is_sought_so_far_ahead(last: int, expected: list[int]) -> None:
    """After the first miss the place is 1, and after `last` it would be `last` + 1."""
    prediction = Prediction(range(AHEAD + 9), 0)
    prediction.begin([99_999, 99_999, last - 1, last])
    assert list(prediction.propose(1).tokens) == expected


def test_what_was_seen_further_ahead_is_not_sought() -> None:
    prediction = Prediction(range(AHEAD + 9), 0)
    prediction.begin([0, 1, 2, 3, 4, 99_999, 99_999, 1, 2, 99_999, 99_999, AHEAD + 4, AHEAD + 5])
    assert prediction.propose(1).tokens == ()


def test_so_many_tokens_are_compared() -> None:
    run = list(range(SYNC_LONG - 1))
    prediction = Prediction([77, *run, 50, 88, *run, 60, 51, 77, *run, 60, 52], 0)
    prediction.begin([77, *run, 60])
    assert prediction.propose(1).tokens == [51]


def test_nothing_is_drafted_after_the_end() -> None:
    prediction = Prediction([1, 2], 0)
    prediction.begin([1, 2])
    assert prediction.propose(9).tokens == ()
