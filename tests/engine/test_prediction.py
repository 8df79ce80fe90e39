"""The `prediction` proposer against a reference made of lists and scans of them."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.speculate.prediction import (
    MAX_CANDIDATES_PER_SIDE,
    MAX_SKIP_TOKENS,
    MAX_SYNC_TOKENS,
    MIN_SYNC_TOKENS,
    PredictionProposer,
)

# An operation: its name, two numbers and tokens.
Operation = tuple[str, int, int, list[int]]


class NaivePrediction:
    """A reference proposer that follows the whole output again for every draft."""

    def __init__(self, predicted: list[int], prompt_length: int) -> None:
        self.predicted, self.prompt_length = predicted, prompt_length
        self.history: list[int] = []

    def shift(self, keep: int, discard: int) -> None:
        self.prompt_length -= sum(keep <= position < keep + discard for position in range(self.prompt_length))
        self.history = self.history[:keep] + self.history[keep + discard :]

    def agreed(self, output: list[int], position: int) -> int:
        most = min(position, len(output), MAX_SYNC_TOKENS)
        return next(
            n for n in range(most, -1, -1) if self.predicted[position - n : position] == output[len(output) - n :]
        )

    def found(self, output: list[int], old: int) -> int | None:
        last, ends = output[-MIN_SYNC_TOKENS:], range(MIN_SYNC_TOKENS, len(self.predicted) + 1)
        positions = [end for end in ends if self.predicted[end - MIN_SYNC_TOKENS : end] == last]
        later = [position for position in positions if old <= position <= old + MAX_SKIP_TOKENS]
        before = [position for position in positions if position < old][-MAX_CANDIDATES_PER_SIDE:]
        later = later[:MAX_CANDIDATES_PER_SIDE]
        longest = max((self.agreed(output, position) for position in later + before), default=0)
        by_preference = later + before[::-1]
        return next((position for position in by_preference if self.agreed(output, position) == longest), None)

    def propose(self, limit: int) -> list[int]:
        output = self.history[self.prompt_length :]
        position = misses = 0
        for end, token in enumerate(output, 1):
            if self.predicted[position : position + 1] == [token]:
                position, misses = position + 1, 0
            elif (found := self.found(output[:end], position)) is not None:
                position, misses = found, 0
            else:
                misses += 1
                position += misses == 1
        return self.predicted[position : position + limit] if misses < 2 else []


def operations(drawn: bytes) -> list[Operation]:
    """Decodes nine bytes each, as hypothesis takes several times as long to draw every part on its own."""
    names = ["observe"] * 6 + ["copy"] * 6 + ["truncate", "shift"]
    return [
        (names[name % 14], first % 40, second % 12, [token % 3 for token in tokens[: 1 + size % 5]])
        for name, first, second, size, *tokens in zip(*[iter(drawn)] * 9, strict=False)
    ]


PREDICTED = st.lists(st.integers(0, 2), max_size=30)


@settings(max_examples=300, deadline=None)
@given(PREDICTED, st.integers(0, 6), st.binary(min_size=315, max_size=450).map(operations))
def test_equals_the_reference(predicted: list[int], prompt_length: int, operations: list[Operation]) -> None:
    prediction, naive = PredictionProposer(predicted, prompt_length), NaivePrediction(predicted, prompt_length)
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
def test_equals_the_reference_with_many_candidates(predicted: list[int], output: list[int]) -> None:
    prediction, naive = PredictionProposer(predicted, 0), NaivePrediction(predicted, 0)
    for i in range(len(output)):
        prediction.observe(output[i : i + 1])
    naive.history = output
    assert list(prediction.propose(8).tokens) == naive.propose(8)


def tokens_of(text: str) -> list[int]:
    """Returns a token for each word, sign or run of blanks."""
    return [sum(ord(char) << 8 * i for i, char in enumerate(word)) for word in re.findall(r"\w+|\s+|.", text)]


def count_steps(predicted: str, output: str, limit: int = 16) -> tuple[int, int]:
    """Returns the number of steps that the output takes and the number of accepted draft tokens."""
    prediction, tokens = PredictionProposer(tokens_of(predicted), 0), tokens_of(output)
    prediction.begin([])
    count = right = done = 0
    while done < len(tokens):
        draft = list(prediction.propose(limit).tokens)
        accepted = next((i for i, token in enumerate(draft) if tokens[done + i : done + i + 1] != [token]), len(draft))
        prediction.observe(tokens[done : done + accepted + 1], len(draft), accepted)
        done, right, count = done + accepted + 1, right + accepted, count + 1
    return count, right


CODE = "\n".join(f"    total{i} = old + step({i}, old)\n    check(total{i}, limit={i * 7})" for i in range(12))
LENGTH = len(tokens_of(CODE))


def test_the_predicted_text_takes_a_step_for_each_draft() -> None:
    assert count_steps(CODE, CODE) == (-(-LENGTH // 17), LENGTH - LENGTH // 17)


def test_a_renamed_variable_costs_a_step_for_each_use() -> None:
    count, _ = count_steps(CODE, CODE.replace("old", "new"), limit=64)
    assert count <= 2 * 12 + 2


def test_a_name_that_becomes_two_tokens_costs_four_steps() -> None:
    count, _ = count_steps(CODE, CODE.replace("old", "new.er"), limit=64)
    assert count <= 2 * 12 * 4 + 2


def test_inserted_lines_are_passed() -> None:
    lines = CODE.split("\n")
    output = "\n".join([*lines[:8], "    print(1)", "    return early", *lines[8:]])
    count, right = count_steps(CODE, output, limit=64)
    assert right >= LENGTH - 12
    assert count <= 30


def test_deleted_lines_are_skipped() -> None:
    lines = CODE.split("\n")
    count, right = count_steps(CODE, "\n".join(lines[:6] + lines[10:]), limit=64)
    assert right >= LENGTH * 20 // 24 - 12
    assert count <= 12


def test_the_prompt_is_not_followed() -> None:
    prediction = PredictionProposer([1, 2, 3, 4], 3)
    prediction.begin([1, 2])
    prediction.observe([1])
    assert prediction.propose(2).tokens == [1, 2]
    prediction.observe([1])
    assert prediction.propose(9).tokens == [2, 3, 4]


def test_a_draft_has_at_most_n_max_tokens() -> None:
    prediction = PredictionProposer(list(range(9)), 0, n_max=3)
    prediction.begin([])
    assert prediction.propose(9).tokens == [0, 1, 2]


def test_one_token_may_be_replaced_and_two_are_a_divergence() -> None:
    prediction = PredictionProposer([1, 2, 3, 4, 5], 0)
    prediction.begin([1, 9])
    assert prediction.propose(9).tokens == [3, 4, 5]
    prediction.observe([9])
    assert prediction.propose(9).tokens == ()
    prediction.observe([3])
    assert prediction.propose(9).tokens == [4, 5]


def test_the_position_is_found_again_by_two_tokens() -> None:
    prediction = PredictionProposer([1, 2, 3, 4, 5, 6, 7], 0)
    prediction.begin([1, 9, 9, 5])
    assert prediction.propose(9).tokens == ()
    prediction.observe([6])
    assert prediction.propose(9).tokens == [7]


@pytest.mark.parametrize(("keep", "discard"), [(3, 2), (0, 4), (1, 3)])
def test_an_edit_moves_the_position_back(keep: int, discard: int) -> None:
    edited, fresh = PredictionProposer([3, 2, 3, 4, 5], 2), PredictionProposer([3, 2, 3, 4, 5], 2 - max(0, 2 - keep))
    edited.begin([8, 8, 3, 2, 3])
    edited.shift(keep, discard)
    fresh.begin([8, 8, 3, 2, 3][:keep] + [8, 8, 3, 2, 3][keep + discard :])
    assert edited.propose(9).tokens == fresh.propose(9).tokens == [2, 3, 4, 5]


@pytest.mark.parametrize(
    ("repeats", "expected"), [(MAX_CANDIDATES_PER_SIDE - 3, [3]), (MAX_CANDIDATES_PER_SIDE - 2, [9])]
)
def test_candidates_per_side_are_bounded(repeats: int, expected: list[int]) -> None:
    """The best position is the last of `repeats` + 3 candidates; the current position is the first."""
    prediction = PredictionProposer([8, 2, 2, 9] + [2, 2, 4] * repeats + [2, 2, 2, 3], 0)
    prediction.begin([8, 2, 2, 2])
    assert prediction.propose(1).tokens == expected


@pytest.mark.parametrize(("last", "expected"), [(MAX_SKIP_TOKENS, [MAX_SKIP_TOKENS + 1]), (MAX_SKIP_TOKENS + 1, [])])
def test_skips_are_bounded(last: int, expected: list[int]) -> None:
    """After the first miss the position is 1; after the token `last` the position would be `last` + 1."""
    prediction = PredictionProposer(range(MAX_SKIP_TOKENS + 9), 0)
    prediction.begin([99_999, 99_999, last - 1, last])
    assert list(prediction.propose(1).tokens) == expected


def test_indexed_tokens_beyond_the_bound_are_not_candidates() -> None:
    prediction = PredictionProposer(range(MAX_SKIP_TOKENS + 9), 0)
    prediction.begin([0, 1, 2, 3, 4, 99_999, 99_999, 1, 2, 99_999, 99_999, MAX_SKIP_TOKENS + 4, MAX_SKIP_TOKENS + 5])
    assert prediction.propose(1).tokens == ()


def test_compared_tokens_are_bounded() -> None:
    run = list(range(MAX_SYNC_TOKENS - 1))
    prediction = PredictionProposer([77, *run, 50, 88, *run, 60, 51, 77, *run, 60, 52], 0)
    prediction.begin([77, *run, 60])
    assert prediction.propose(1).tokens == [51]


def test_nothing_is_drafted_after_the_end() -> None:
    prediction = PredictionProposer([1, 2], 0)
    prediction.begin([1, 2])
    assert prediction.propose(9).tokens == ()
