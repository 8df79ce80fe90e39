"""Detokenizer: characters across tokens, stop strings, and the number of released tokens."""

from __future__ import annotations

import doctest
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import engine.text
from engine.text import Detokenizer, TextRange

FAMILY = "👨‍👩‍👧‍👦"  # four people and three zero-width joiners: 25 bytes
SAMPLES = ["plain", "naïve café", "你好，世界", "日本語テキスト", "🙂🙃", FAMILY, "a\u0301b", "\x00\t\n", "𝔘𝔫𝔦"]

# Few letters, so that stop strings are found and overlap.
stops = st.lists(st.text("ab🙂", min_size=1, max_size=4), max_size=4).map(tuple)
texts = st.text("ab🙂", max_size=20)
byte_strings = texts.map(str.encode) | st.binary(max_size=30)


@st.composite
def cuts(draw: st.DrawFn, whole: bytes) -> list[bytes]:
    """Cuts `whole` into parts, some of them empty."""
    positions = sorted(draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    return [whole[a:b] for a, b in zip([0, *positions], [*positions, len(whole)], strict=True)]


def feed_all(detokenizer: Detokenizer, parts: Iterable[bytes]) -> tuple[str, int]:
    """Returns the released text and the number of released tokens."""
    released = [detokenizer.feed(part) for part in parts]
    released.append(detokenizer.finish())
    return "".join(text for text, _ in released), sum(tokens for _, tokens in released)


def one_by_one(whole: bytes) -> list[bytes]:
    return [whole[i : i + 1] for i in range(len(whole))]


def slow_stop(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """Extends the text character by character until it ends with a stop string."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end - len(stop)], stop
    return text, None


def test_docs() -> None:
    results = doctest.testmod(engine.text)
    assert results.attempted > 0
    assert results.failed == 0


@pytest.mark.parametrize("text", SAMPLES)
def test_bytes_one_at_a_time(text: str) -> None:
    detokenizer = Detokenizer()
    for character in text:
        parts = one_by_one(character.encode())
        assert [detokenizer.feed(part).text for part in parts] == [""] * (len(parts) - 1) + [character]
    assert detokenizer.finish() == ("", 0)


@pytest.mark.parametrize("text", SAMPLES)
def test_characters_one_at_a_time(text: str) -> None:
    detokenizer = Detokenizer(stops=("never",))
    assert feed_all(detokenizer, [character.encode() for character in text]) == (text, len(text))


def test_an_incomplete_character_becomes_a_replacement() -> None:
    detokenizer = Detokenizer()
    assert detokenizer.feed("a🙂".encode()[:3]) == ("a", 0)
    assert detokenizer.finish() == ("\ufffd", 1)
    detokenizer = Detokenizer()
    assert detokenizer.feed(b"\xe4\xbd") == ("", 0)
    assert detokenizer.feed(b"x") == ("\ufffdx", 2)


@given(st.data(), byte_strings)
def test_without_stops_any_cut_gives_the_same_text(data: st.DataObject, whole: bytes) -> None:
    parts = data.draw(cuts(whole))
    assert feed_all(Detokenizer(), parts) == (whole.decode("utf-8", "replace"), len(parts))


@settings(max_examples=400)
@given(st.data(), byte_strings, stops)
def test_with_stops_any_cut_gives_the_same_text(data: st.DataObject, whole: bytes, stops: tuple[str, ...]) -> None:
    text, stop = slow_stop(whole.decode("utf-8", "replace"), stops)
    detokenizer = Detokenizer(stops)
    assert feed_all(detokenizer, data.draw(cuts(whole)))[0] == text
    assert detokenizer.stopped_by == stop


@given(st.data(), texts, stops)
def test_nothing_is_held_back_without_need(data: st.DataObject, text: str, stops: tuple[str, ...]) -> None:
    """All text is released except an end that may become a stop string."""
    detokenizer, released, seen = Detokenizer(stops), "", ""
    for character in text:
        released += detokenizer.feed(character.encode()).text
        seen += character
        if detokenizer.stopped_by is not None:
            break
        tails = [seen[-size:] for size in range(1, len(seen) + 1)]
        held = max((len(tail) for tail in tails if any(stop.startswith(tail) for stop in stops)), default=0)
        assert released == seen[: len(seen) - held]


def test_the_first_stop_string_to_be_complete_wins() -> None:
    for parts in ([b"one STOP two END"], one_by_one(b"one STOP two END")):
        detokenizer = Detokenizer(stops=("END", "STOP"))
        assert feed_all(detokenizer, parts)[0] == "one "
        assert detokenizer.stopped_by == "STOP"


def test_the_longer_of_two_stop_strings_with_one_end_wins() -> None:
    for parts in ([b"x\n\nUser: y"], one_by_one(b"x\n\nUser: y")):
        detokenizer = Detokenizer(stops=("User:", "\nUser:"))
        assert feed_all(detokenizer, parts)[0] == "x\n"
        assert detokenizer.stopped_by == "\nUser:"


def test_a_stop_string_inside_another_ends_the_text_sooner() -> None:
    for parts in ([b"--abcd"], one_by_one(b"--abcd")):
        detokenizer = Detokenizer(stops=("abcd", "bc"))
        assert feed_all(detokenizer, parts)[0] == "--a"
        assert detokenizer.stopped_by == "bc"


def test_a_false_start_is_released() -> None:
    detokenizer = Detokenizer(stops=("</s>",))
    assert [detokenizer.feed(part).text for part in (b"a <", b"/", b"p> <", b"/s", b">!")] == [
        "a ",
        "",
        "</p> ",
        "",
        "",
    ]
    assert detokenizer.stopped_by == "</s>"
    assert detokenizer.feed(b"more") == ("", 0)
    assert detokenizer.finish() == ("", 0)


def test_an_incomplete_stop_string_is_released_at_the_end() -> None:
    detokenizer = Detokenizer(stops=("END",))
    assert detokenizer.feed(b"the EN") == ("the ", 0)
    assert detokenizer.finish() == ("EN", 1)
    assert detokenizer.stopped_by is None


def test_an_empty_stop_string_is_ignored() -> None:
    assert feed_all(Detokenizer(stops=("",)), [b"abc"]) == ("abc", 1)


@given(st.data(), texts, stops, st.integers(0, 12))
def test_stop_strings_match_only_beyond_the_minimum(
    data: st.DataObject, text: str, stops: tuple[str, ...], min_tokens: int
) -> None:
    """As in vLLM, a stop string may begin among the first tokens but not end there."""
    parts = [part.encode() for part in text]
    ends = [at + len(stop) for stop in stops for at in range(len(text)) if text.startswith(stop, at)]
    end = min((end for end in ends if end > min_tokens), default=None)
    detokenizer = Detokenizer(stops, min_tokens=min_tokens)
    released = feed_all(detokenizer, parts)[0]
    if end is None:
        assert (released, detokenizer.stopped_by) == (text, None)
    else:
        assert detokenizer.stopped_by is not None
        assert released == text[: end - len(detokenizer.stopped_by)]
        assert text[:end].endswith(detokenizer.stopped_by)


class _QuotesExempt:
    """A scope that excludes quoted text, and decides on a quoted text once it ends."""

    def __init__(self) -> None:
        self.decided, self._text = 0, ""

    def ranges(self, text: str, *, final: bool) -> list[TextRange]:
        self._text += text
        start, inside, found = self.decided, False, list[TextRange]()
        for at in range(start, len(self._text)):
            if self._text[at] == "'":
                inside = not inside
                if inside and start < at:
                    found.append((start, at))
                start = self.decided = at + (not inside)
        if not inside and start < len(self._text):
            found.append((start, len(self._text)))
            self.decided = len(self._text)
        return found


@given(st.data())
def test_stop_strings_apply_inside_their_scope_only(data: st.DataObject) -> None:
    text = "ab 'END END' E 'x' N EN'END'D END later"
    detokenizer = Detokenizer(("END",), scope=_QuotesExempt())
    parts = data.draw(cuts(text.encode()))
    assert feed_all(detokenizer, parts)[0] == text.partition("END later")[0]
    assert detokenizer.stopped_by == "END"


def test_tokens_after_a_late_match_are_surplus() -> None:
    detokenizer = Detokenizer(("END",), scope=_Undecided())
    assert feed_all(detokenizer, [b"aE", b"ND", b"b", b"c"]) == ("a", 1)
    assert detokenizer.surplus == 2


class _Undecided:
    """A scope that is decided at the end of the text only."""

    def __init__(self) -> None:
        self.decided, self._size = 0, 0

    def ranges(self, text: str, *, final: bool) -> list[TextRange]:
        self._size += len(text)
        return [(0, self._size)] if final else []


class TestTokens:
    """`DecodedText.tokens`: the number of released tokens."""

    def counts(self, stops: tuple[str, ...], *parts: bytes) -> list[int]:
        detokenizer = Detokenizer(stops)
        return [detokenizer.feed(part).tokens for part in parts] + [detokenizer.finish().tokens]

    def test_each_token_is_released_with_its_text(self) -> None:
        assert self.counts((), b"a", b"bc", b" d") == [1, 1, 1, 0]

    def test_a_token_without_text_is_released_with_the_next(self) -> None:
        assert self.counts((), b"", b"a", b"") == [1, 1, 1, 0]
        assert self.counts(("ab",), b"a", b"", b"c") == [0, 0, 3, 0]

    def test_parts_of_a_character_are_released_together(self) -> None:
        smile = "🙂".encode()
        assert self.counts((), smile[:1], smile[1:3], smile[3:], b"x") == [0, 0, 3, 1, 0]
        assert self.counts((), b"a" + smile[:2], smile[2:] + b"b") == [0, 2, 0]

    def test_tokens_are_held_back_while_a_stop_string_may_follow(self) -> None:
        assert self.counts(("END",), b"E", b"N", b"x", b"E") == [0, 0, 3, 0, 1]

    def test_tokens_of_a_stop_string_are_never_released(self) -> None:
        assert self.counts(("END",), b"a", b"E", b"N", b"D", b"b") == [1, 0, 0, 0, 0, 0]
        smile = "🙂".encode()
        assert self.counts(("🙂!",), b"a", smile[:2], smile[2:], b"!") == [1, 0, 0, 0, 0]

    def test_a_token_that_begins_before_a_stop_string_is_released(self) -> None:
        assert self.counts(("END",), b"a", b"bE", b"NDc") == [1, 0, 1, 0]
        smile = "🙂".encode()
        assert self.counts(("END",), smile[:2], smile[2:] + b"E", b"ND") == [0, 1, 1, 0]

    @given(st.data(), byte_strings, stops)
    def test_tokens_with_released_text_are_released(
        self, data: st.DataObject, whole: bytes, stops: tuple[str, ...]
    ) -> None:
        """Without a stop string all tokens are released; with one, the tokens that begin before it."""
        parts = data.draw(cuts(whole))
        detokenizer = Detokenizer(stops)
        text, out = feed_all(detokenizer, parts)
        if detokenizer.stopped_by is None:
            assert out == len(parts)
            return
        assert out <= len(parts)
        # The released tokens contain the whole text, and all but the last of them contain nothing else.
        assert b"".join(parts[:out]).decode("utf-8", "replace").startswith(text)
        assert len(b"".join(parts[: max(0, out - 1)]).decode("utf-8", "ignore")) <= len(text)

    @given(st.data(), texts, stops)
    def test_a_token_is_released_once_its_characters_are(
        self, data: st.DataObject, text: str, stops: tuple[str, ...]
    ) -> None:
        parts = data.draw(cuts(text.encode()))
        detokenizer = Detokenizer(stops)
        released, out = "", 0
        for fed, part in enumerate(parts, 1):
            fresh, tokens = detokenizer.feed(part)
            released, out = released + fresh, out + tokens
            if detokenizer.stopped_by is not None:
                break
            ends = [len(b"".join(parts[:count]).decode("utf-8", "replace")) for count in range(1, fed + 1)]
            assert out == sum(end <= len(released) for end in ends)
