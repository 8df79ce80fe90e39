"""Converts the bytes of tokens to text: joins UTF-8 across tokens, and holds back possible stop strings."""

from __future__ import annotations

import codecs
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeAlias

# Returns the bytes of a token.
TokenBytes: TypeAlias = Callable[[int], bytes]
# The characters from a start to an end, counted from the start of the output.
TextRange: TypeAlias = tuple[int, int]


def with_control_texts(control_texts: Sequence[tuple[int, str]], token_bytes: TokenBytes) -> TokenBytes:
    """Returns `token_bytes`, except that each token in `control_texts` has the bytes of its text there."""
    if not control_texts:
        return token_bytes
    contents = {token: text.encode() for token, text in control_texts}
    return lambda token: contents[token] if token in contents else token_bytes(token)


def partial_match_length(text: str, markers: Sequence[str]) -> int:
    """Returns the length of the longest suffix of `text` that is a proper prefix of one of `markers`.

    >>> partial_match_length("a <tool", ["<tool_call>", "<think>"])
    5
    """
    longest = 0
    for marker in markers:
        at = text.find(marker[:1], max(0, len(text) - len(marker) + 1))
        while at >= 0 and not marker.startswith(text[at:]):
            at = text.find(marker[0], at + 1)
        if at >= 0:
            longest = max(longest, len(text) - at)
    return longest


class StopScope(Protocol):
    """Decides to which parts of one output stop strings apply."""

    @property
    def decided(self) -> int:
        """Number of leading characters of the output that are decided. No later range starts before them."""

    def ranges(self, text: str, *, final: bool) -> Sequence[TextRange]:
        """Appends `text` to the output, which is complete if `final`. Returns the ranges to which stop strings apply,
        in order, except those returned before."""


class _WholeText:
    """The scope of stop strings that apply everywhere."""

    def __init__(self) -> None:
        self.decided = 0

    def ranges(self, text: str, *, final: bool) -> Sequence[TextRange]:
        start, self.decided = self.decided, self.decided + len(text)
        return [(start, self.decided)]


class DecodedText(NamedTuple):
    """The text and the tokens that one call of a `Detokenizer` releases."""

    text: str
    tokens: int
    """Number of tokens that this call releases."""


class _TokenSpan(NamedTuple):
    """The range of a token's characters, including those shared with other tokens."""

    start: int
    end: int
    complete: int
    """Number of characters that are complete after the token."""


class Detokenizer:
    """Decodes the bytes of tokens and holds back only text that may still change.

    The bytes of an incomplete UTF-8 character are held back, and so is the longest suffix of the text that may become a
    stop string. The stop string that is complete first matches; of several that end at the same character the longest
    one matches. A matched stop string and all text after it are never released. The released text depends only on the
    bytes, not on the boundaries of tokens. A token is released once all of its characters are released. At a match the
    tokens that begin before the stop string are released, the others never.
    """

    def __init__(self, stops: Sequence[str] = (), *, min_tokens: int = 0, scope: StopScope | None = None) -> None:
        """A stop string that the first `min_tokens` tokens complete does not match, as in vLLM. A stop string matches
        only inside one range of `scope`, or of adjacent ranges; None means everywhere."""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = tuple(stop for stop in stops if stop)
        self._min_tokens = min_tokens
        self._whole = _WholeText()
        self._scope = scope or self._whole
        self._stop_starts = {stop[0] for stop in self._stops}
        self._held = ""
        self._fed = 0  # tokens fed; all of them if there are stop strings
        # Characters decoded by `_decoder`, both released and held ones.
        self._decoded = 0
        self._protected = 0  # leading characters that complete no stop string
        self._run: TextRange = (0, 0)  # the last adjacent ranges of the scope
        self._spans: list[_TokenSpan] = []  # tokens that are not released
        self.stopped_by: str | None = None
        """The stop string that matched. None before a match."""
        self.surplus = 0
        """Number of tokens fed after the token that completed the stop string."""

    def feed(self, content: bytes) -> DecodedText:
        """Adds the bytes of one token and returns the text released by them. After a match no text is released.

        >>> detokenizer = Detokenizer(stops=("END",))
        >>> detokenizer.feed("é".encode()[:1]).text, detokenizer.feed("é".encode()[1:] + b" E").text
        ('', 'é ')
        >>> detokenizer.feed(b"NDless").text, detokenizer.stopped_by
        ('', 'END')
        """
        if self.stopped_by is not None:
            return DecodedText("", 0)
        if (text := self.decode_complete(content)) is not None:
            return DecodedText(text, 1)
        start = self._decoded
        fresh = self._decoder.decode(content)
        self._decoded += len(fresh)
        incomplete = bool(self._decoder.getstate()[0])
        self._spans.append(_TokenSpan(start, self._decoded + incomplete, self._decoded))
        self._fed += 1
        if self._fed <= self._min_tokens:
            self._protected = self._decoded
        return self._release(fresh, final=False)

    def decode_complete(self, content: bytes, tokens: int = 1) -> str | None:
        """Returns the text of `tokens` tokens if no text is held back before or after them, the usual case.

        Returns None, with the state unchanged, if text is or may have to be held back.
        """
        if self._spans:
            return None
        try:
            text = content.decode()
        except UnicodeDecodeError:
            return None
        if self._stops:
            if self._scope is not self._whole or not self._stop_starts.isdisjoint(text):
                return None
            self._fed += tokens
            self._decoded = self._whole.decided = self._decoded + len(text)
            self._run = (0, self._decoded)
        return text

    def finish(self) -> DecodedText:
        """Releases all held text after the last token. An incomplete character becomes U+FFFD."""
        if self.stopped_by is not None:
            return DecodedText("", 0)
        fresh = self._decoder.decode(b"", True)
        self._decoded += len(fresh)
        return self._release(fresh, final=True)

    def _release(self, fresh: str, *, final: bool) -> DecodedText:
        text = self._held + fresh
        offset = self._decoded - len(text)
        for start, end in self._scope.ranges(fresh, final=final):
            run_start, run_end = self._run
            self._run = (run_start if start == run_end else start, end)
            if (found := self._first_stop(text, offset)) is not None:
                return self._stop(text, offset, *found)
        size = len(text) if final else self._decided_size(text, offset)
        self._held = text[size:]
        return DecodedText(text[:size], self._release_ended(offset + size))

    def _decided_size(self, text: str, offset: int) -> int:
        """Returns the number of leading characters of `text` in which no stop string can begin any more."""
        (start, end), decided = self._run, self._scope.decided
        if end < decided:
            return decided - offset
        run = text[max(0, start - offset) : end - offset]
        return end - offset - partial_match_length(run, self._stops)

    def _first_stop(self, text: str, offset: int) -> tuple[int, str] | None:
        """Returns the place in `text` of the stop string that is complete first, and that stop string.

        `offset` is the place of `text` in the output. Returns None if there is no match in the last adjacent ranges.
        """
        start, end = (max(0, at - offset) for at in self._run)
        first_end = self._protected - offset + 1
        found = [
            (at + len(stop), at, stop)
            for stop in self._stops
            if (at := text.find(stop, max(start, first_end - len(stop)), end)) >= 0
        ]
        return min(found)[1:] if found else None

    def _stop(self, text: str, offset: int, at: int, stop: str) -> DecodedText:
        self.stopped_by = stop
        stop_end = offset + at + len(stop)
        self.surplus = sum(span.complete >= stop_end for span in self._spans[:-1])
        return DecodedText(text[:at], self._release_begun(offset + at))

    def _release_ended(self, position: int) -> int:
        """Removes the tokens that end at or before character `position`. Returns the number of removed tokens."""
        count = bisect_right(self._spans, position, key=lambda span: span.end)
        del self._spans[:count]
        return count

    def _release_begun(self, position: int) -> int:
        """Removes all tokens. Returns the number of tokens that begin before character `position`."""
        spans, self._spans = self._spans, []
        return bisect_left(spans, position, key=lambda span: span.start)
