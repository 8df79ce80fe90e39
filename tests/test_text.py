"""Text from pieces of tokens: characters cut in two, stop strings, and how many tokens are out."""

from __future__ import annotations

import doctest
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import engine.text
from engine.text import TextStream

FAMILY = "👨‍👩‍👧‍👦"  # four people and three zero-width joiners: 25 bytes
SAMPLES = ["plain", "naïve café", "你好，世界", "日本語テキスト", "🙂🙃", FAMILY, "a\u0301b", "\x00\t\n", "𝔘𝔫𝔦"]

# Few letters, so that stop strings are found and overlap.
stops = st.lists(st.text("ab🙂", min_size=1, max_size=4), max_size=4).map(tuple)
texts = st.text("ab🙂", max_size=20)
byte_strings = texts.map(str.encode) | st.binary(max_size=30)


@st.composite
def cuts(draw: st.DrawFn, whole: bytes) -> list[bytes]:
    """The bytes in pieces, some of them empty."""
    places = sorted(draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    return [whole[a:b] for a, b in zip([0, *places], [*places, len(whole)], strict=True)]


def feed_all(stream: TextStream, pieces: Iterable[bytes]) -> tuple[str, int]:
    """The joined text, and the tokens that are out."""
    shown = [stream.feed(piece) for piece in pieces]
    shown.append(stream.finish())
    return "".join(text for text, _ in shown), sum(tokens for _, tokens in shown)


def one_by_one(whole: bytes) -> list[bytes]:
    return [whole[i : i + 1] for i in range(len(whole))]


def slow_stop(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """Reads character by character until the text ends with a stop string."""
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
    stream = TextStream()
    for character in text:
        pieces = one_by_one(character.encode())
        assert [stream.feed(piece).text for piece in pieces] == [""] * (len(pieces) - 1) + [character]
    assert stream.finish() == ("", 0)


@pytest.mark.parametrize("text", SAMPLES)
def test_characters_one_at_a_time(text: str) -> None:
    stream = TextStream(stops=("never",))
    assert feed_all(stream, [character.encode() for character in text]) == (text, len(text))


def test_a_character_cut_short_shows_as_a_replacement() -> None:
    stream = TextStream()
    assert stream.feed("a🙂".encode()[:3]) == ("a", 0)
    assert stream.finish() == ("\ufffd", 1)
    stream = TextStream()
    assert stream.feed(b"\xe4\xbd") == ("", 0)
    assert stream.feed(b"x") == ("\ufffdx", 2)


@given(st.data(), byte_strings)
def test_without_stops_any_cut_gives_the_same_text(data: st.DataObject, whole: bytes) -> None:
    pieces = data.draw(cuts(whole))
    assert feed_all(TextStream(), pieces) == (whole.decode("utf-8", "replace"), len(pieces))


@settings(max_examples=400)
@given(st.data(), byte_strings, stops)
def test_with_stops_any_cut_gives_the_same_text(data: st.DataObject, whole: bytes, stops: tuple[str, ...]) -> None:
    text, stop = slow_stop(whole.decode("utf-8", "replace"), stops)
    stream = TextStream(stops)
    assert feed_all(stream, data.draw(cuts(whole)))[0] == text
    assert stream.stopped_by == stop


@given(st.data(), texts, stops)
def test_nothing_is_held_back_without_need(data: st.DataObject, text: str, stops: tuple[str, ...]) -> None:
    """What is shown so far is all but what may still become a stop string."""
    stream, shown, seen = TextStream(stops), "", ""
    for character in text:
        shown += stream.feed(character.encode()).text
        seen += character
        if stream.stopped_by is not None:
            break
        tails = [seen[-size:] for size in range(1, len(seen) + 1)]
        held = max((len(tail) for tail in tails if any(stop.startswith(tail) for stop in stops)), default=0)
        assert shown == seen[: len(seen) - held]


def test_the_first_stop_string_to_be_complete_wins() -> None:
    for pieces in ([b"one STOP two END"], one_by_one(b"one STOP two END")):
        stream = TextStream(stops=("END", "STOP"))
        assert feed_all(stream, pieces)[0] == "one "
        assert stream.stopped_by == "STOP"


def test_of_two_that_end_at_one_place_the_longer_wins() -> None:
    for pieces in ([b"x\n\nUser: y"], one_by_one(b"x\n\nUser: y")):
        stream = TextStream(stops=("User:", "\nUser:"))
        assert feed_all(stream, pieces)[0] == "x\n"
        assert stream.stopped_by == "\nUser:"


def test_one_inside_another_ends_the_text_sooner() -> None:
    for pieces in ([b"--abcd"], one_by_one(b"--abcd")):
        stream = TextStream(stops=("abcd", "bc"))
        assert feed_all(stream, pieces)[0] == "--a"
        assert stream.stopped_by == "bc"


def test_a_false_start_is_shown() -> None:
    stream = TextStream(stops=("</s>",))
    assert [stream.feed(piece).text for piece in (b"a <", b"/", b"p> <", b"/s", b">!")] == ["a ", "", "</p> ", "", ""]
    assert stream.stopped_by == "</s>"
    assert stream.feed(b"more") == ("", 0)
    assert stream.finish() == ("", 0)


def test_an_unfinished_stop_string_is_shown_at_the_end() -> None:
    stream = TextStream(stops=("END",))
    assert stream.feed(b"the EN") == ("the ", 0)
    assert stream.finish() == ("EN", 1)
    assert stream.stopped_by is None


def test_an_empty_stop_string_is_none() -> None:
    assert feed_all(TextStream(stops=("",)), [b"abc"]) == ("abc", 1)


class TestTokens:
    """`Shown.tokens`: tokens that are out, of which the ids and log probabilities may be read."""

    def counts(self, stops: tuple[str, ...], *pieces: bytes) -> list[int]:
        stream = TextStream(stops)
        return [stream.feed(piece).tokens for piece in pieces] + [stream.finish().tokens]

    def test_each_is_out_with_its_text(self) -> None:
        assert self.counts((), b"a", b"bc", b" d") == [1, 1, 1, 0]

    def test_a_token_without_text_goes_along(self) -> None:
        assert self.counts((), b"", b"a", b"") == [1, 1, 1, 0]
        assert self.counts(("ab",), b"a", b"", b"c") == [0, 0, 3, 0]

    def test_parts_of_a_character_are_out_together(self) -> None:
        smile = "🙂".encode()
        assert self.counts((), smile[:1], smile[1:3], smile[3:], b"x") == [0, 0, 3, 1, 0]
        assert self.counts((), b"a" + smile[:2], smile[2:] + b"b") == [0, 2, 0]

    def test_held_back_until_no_stop_string_can_come(self) -> None:
        assert self.counts(("END",), b"E", b"N", b"x", b"E") == [0, 0, 3, 0, 1]

    def test_those_of_a_stop_string_never_are(self) -> None:
        assert self.counts(("END",), b"a", b"E", b"N", b"D", b"b") == [1, 0, 0, 0, 0, 0]
        smile = "🙂".encode()
        assert self.counts(("🙂!",), b"a", smile[:2], smile[2:], b"!") == [1, 0, 0, 0, 0]

    def test_one_that_only_begins_before_a_stop_string_is(self) -> None:
        assert self.counts(("END",), b"a", b"bE", b"NDc") == [1, 0, 1, 0]
        smile = "🙂".encode()
        assert self.counts(("END",), smile[:2], smile[2:] + b"E", b"ND") == [0, 1, 1, 0]

    @given(st.data(), byte_strings, stops)
    def test_all_are_out_that_show_text(self, data: st.DataObject, whole: bytes, stops: tuple[str, ...]) -> None:
        """Without a stop all tokens come out; with one, those that began before it."""
        pieces = data.draw(cuts(whole))
        stream = TextStream(stops)
        text, out = feed_all(stream, pieces)
        if stream.stopped_by is None:
            assert out == len(pieces)
            return
        assert out <= len(pieces)
        # The tokens that are out hold all of the text, and all but the last of them nothing else.
        assert b"".join(pieces[:out]).decode("utf-8", "replace").startswith(text)
        assert len(b"".join(pieces[: max(0, out - 1)]).decode("utf-8", "ignore")) <= len(text)

    @given(st.data(), texts, stops)
    def test_a_token_is_out_once_its_characters_are(
        self, data: st.DataObject, text: str, stops: tuple[str, ...]
    ) -> None:
        pieces = data.draw(cuts(text.encode()))
        stream = TextStream(stops)
        shown, out = "", 0
        for fed, piece in enumerate(pieces, 1):
            fresh, tokens = stream.feed(piece)
            shown, out = shown + fresh, out + tokens
            if stream.stopped_by is not None:
                break
            ends = [len(b"".join(pieces[:count]).decode("utf-8", "replace")) for count in range(1, fed + 1)]
            assert out == sum(end <= len(shown) for end in ends)
