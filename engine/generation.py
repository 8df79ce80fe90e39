"""One request seen from the event loop: entering submits it, reading yields its updates, leaving cancels it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Self

import msgspec

from engine.contract import Failed, Finished, FinishReason, Logprob, Reading, Request, Tokens, Update
from engine.text import Piece, TextStream, spelling


class Generation:
    """The updates of one request, in order: any number of `Tokens`, then one `Finished`, or its error raised.

    Unread tokens merge, so a slow reader costs memory in proportion to its own text and never the engine's time.
    Leaving before the end cancels the request, so it cannot outlive the block that asked for it; nothing is
    awaited on the way out, so a cancelled task can still leave. A stop string ends the generation at once: the
    slot is given back, and `Finished` counts the tokens up to the one that completed the stop string.
    """

    def __init__(
        self,
        request: Request,
        piece: Piece,
        submit: Callable[[Generation], None],
        cancel: Callable[[Generation], None],
    ) -> None:
        self.request = request
        self.key = 0
        """The engine's name for it, given when it is submitted."""
        self._piece = spelling(request.spelled, piece)
        self._submit = submit
        self._cancel = cancel
        self._text = TextStream(request.stop)
        self._reader: asyncio.Future[None] | None = None  # of one who waits for something to read
        self._ids: list[int] = []  # unread, those last whose text is still held back
        self._logprobs: list[Logprob] = []
        self._out = 0  # how many of them may be read
        self._shown = ""
        self._count = 0  # tokens received, up to the one that completed a stop string
        self._reading: Reading | None = None  # unread
        self._end: Finished | Failed | None = None
        self._enough = False
        self._drained = False

    @property
    def complete(self) -> bool:
        """Whether a stop string, or who has enough, has ended the text."""
        return self._enough or self._text.stopped_by is not None

    async def __aenter__(self) -> Self:
        self._submit(self)
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._end is None:
            self._cancel(self)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Update:
        if self._drained:
            raise StopAsyncIteration
        if not (self._reading or self._out or self._shown or self._end):
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        if self._reading is not None:
            reading, self._reading = self._reading, None
            return Tokens((), "", reading=reading)
        if self._out or self._shown:
            return self._take()
        self._drained = True
        if isinstance(self._end, Failed):
            raise self._end.error
        assert self._end is not None, "woken without anything to read"
        return self._end

    def enough(self) -> None:
        """Ends the request with what was delivered so far, as its limit would; nothing if it has come to an end."""
        if self._end is None and not self.complete:
            self._enough = True
            self._cancel(self)

    def deliver_tokens(self, ids: Sequence[int], logprobs: Sequence[Logprob] = ()) -> None:
        """Takes the tokens of one step, on the event loop."""
        if self._end is not None or self.complete:
            return
        self._logprobs += logprobs
        if (text := self._text.whole(b"".join(map(self._piece, ids)))) is not None:
            self._count += len(ids)
            self._ids += ids
            self._out += len(ids)
            self._shown += text
            self._wake()
            return
        for token in ids:
            self._count += 1
            self._ids.append(token)
            text, out = self._text.feed(self._piece(token))
            self._out += out
            self._shown += text
            if self._text.stopped_by is not None:
                self._cancel(self)
                break
        if self._out or self._shown:
            self._wake()

    def deliver_reading(self, reading: Reading) -> None:
        """Takes how far its prompt is read, on the event loop; one that was not read by then is no more."""
        self._reading = reading
        self._wake()

    def deliver_end(self, end: Finished | Failed) -> None:
        """Takes the terminal update, on the event loop; a second one is ignored."""
        if self._end is not None:
            return
        if isinstance(end, Finished):
            text, out = self._text.finish()
            self._out += out
            self._shown += text
            end = self._stopped(end)
        self._end = end
        self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _stopped(self, end: Finished) -> Finished:
        """`end` as the reader should see it if a stop string, or who has enough, came first."""
        if not self.complete:
            return end
        stopped_by = self._text.stopped_by
        reason = FinishReason.LENGTH if stopped_by is None else FinishReason.STOP
        usage = msgspec.structs.replace(end.usage, completion=self._count)
        return msgspec.structs.replace(end, reason=reason, usage=usage, stop=stopped_by)

    def _take(self) -> Tokens:
        out = self._out
        update = Tokens(tuple(self._ids[:out]), self._shown, tuple(self._logprobs[:out]))
        del self._ids[:out], self._logprobs[:out]
        self._out, self._shown = 0, ""
        return update
