"""One request on the event loop: entering submits it, iterating yields its updates, leaving cancels it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Self

import msgspec

from engine.contract import (
    REQUEST_FAILED,
    EngineFault,
    Failed,
    Finished,
    FinishReason,
    Logprob,
    PrefillProgress,
    Request,
    Tokens,
    Update,
)
from engine.outbox import SlotTaken, StepOutput
from engine.text import Detokenizer, TokenBytes, with_control_texts

log = logging.getLogger("paceline.engine")


class Generation:
    """The updates of one request, in order: any number of `Tokens`, then one `Finished`, or the error is raised.

    Unread tokens are merged into one update, so a slow consumer costs memory in proportion to its own output and no
    time of the engine. Leaving before the end cancels the request, so the request cannot outlive its `async with`
    block. Leaving awaits nothing, so a cancelled task can still leave. A stop string ends the generation at once: the
    slot is freed, and `Finished` counts the tokens up to the one that completed the stop string.
    """

    def __init__(
        self,
        request: Request,
        piece: TokenBytes,
        submit: Callable[[Generation], None],
        cancel: Callable[[Generation], None],
    ) -> None:
        self.request = request
        self.key = 0
        """The engine's number for the request; 0 until it is submitted."""
        self.slot = -1
        """Number of the slot in which the request runs or ran last; -1 before it starts."""
        self._piece = with_control_texts(request.control_texts, piece)
        self._submit = submit
        self._cancel = cancel
        scope = request.stop_scope() if request.stop and request.stop_scope else None
        self._text = Detokenizer(request.stop, min_tokens=request.min_tokens, scope=scope)
        self._wakeup: asyncio.Future[None] | None = None  # pending while `__anext__` awaits an update
        self._ended: asyncio.Future[None] | None = None  # pending while `pause` awaits the end
        self._can_take: Callable[[], bool] = _never
        self._on_tokens: Callable[[Tokens], None] | None = None
        # Released tokens that were not yielded yet, then tokens whose text is held back.
        self._ids: list[int] = []
        self._logprobs: list[Logprob] = []
        self._origins: list[str] = []
        self._released = 0  # number of released tokens in `_ids`
        self._released_text = ""
        self._count = 0  # tokens received, up to the one at which a stop string was found
        self._progress: PrefillProgress | None = None  # not yielded yet
        self._end: Finished | Failed | None = None
        self._enough = False
        self._exhausted = False

    @property
    def complete(self) -> bool:
        """True after a stop string matched or the consumer called `enough()`."""
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
        if self._exhausted:
            raise StopAsyncIteration
        if not (self._progress or self._released or self._released_text or self._end):
            self._wakeup = asyncio.get_running_loop().create_future()
            await self._wakeup
        if self._progress is not None:
            progress, self._progress = self._progress, None
            return Tokens((), "", prefill_progress=progress)
        if self._released or self._released_text:
            return self._take()
        self._exhausted = True
        if isinstance(self._end, Failed):
            raise self._end.error
        assert self._end is not None, "woken by an update"
        return self._end

    def divert(self, on_tokens: Callable[[Tokens], None], can_take: Callable[[], bool]) -> None:
        """Makes `deliver_tokens` call `on_tokens` while a task awaits `__anext__` and `can_take()` is True. The task
        is not woken then.

        Both functions are called on the event loop. `__anext__` raises an exception of `on_tokens`.
        """
        self._on_tokens, self._can_take = on_tokens, can_take

    async def pause(self, seconds: float) -> None:
        """Waits for `seconds`, in which tokens merge, or until the request has ended."""
        if self._end is None:
            self._ended = asyncio.get_running_loop().create_future()
            await asyncio.wait([self._ended], timeout=seconds)

    def enough(self) -> None:
        """Ends the request after the tokens delivered so far, with finish reason LENGTH. No effect if the request has
        ended."""
        if self._end is None and not self.complete:
            self._enough = True
            self._cancel(self)

    def deliver(self, output: StepOutput) -> bool:
        """Adds the output of one step. Called on the event loop.

        Returns False after an exception, which has failed this request alone and is in the log.
        """
        try:
            if output.event is None:
                self.deliver_tokens(output.ids, output.logprobs, output.origins)
                return True
            match output.event:
                case PrefillProgress():
                    self.deliver_progress(output.event)
                case SlotTaken(number):
                    self.slot = number
                case _:
                    self.deliver_end(output.event)
        except Exception:
            log.exception("request %s failed", self.request.id)
            self._end = Failed(EngineFault(REQUEST_FAILED))
            self._wake()
            return False
        return True

    def deliver_tokens(self, ids: Sequence[int], logprobs: Sequence[Logprob] = (), origins: Sequence[str] = ()) -> None:
        """Adds the tokens of one step. Called on the event loop."""
        if self._end is not None or self.complete:
            return
        text = self._text.decode_complete(b"".join(map(self._piece, ids)), len(ids))
        if text is not None and self._diverts():
            self._count += len(ids)
            self._pass_on(Tokens(tuple(ids), text, tuple(logprobs), tuple(origins)))
            return
        self._logprobs += logprobs
        self._origins += origins
        if text is None:
            self._feed(ids)
        else:
            self._count += len(ids)
            self._ids += ids
            self._released += len(ids)
            self._released_text += text
        if self._released or self._released_text:
            if self._diverts():
                self._pass_on(self._take())
            else:
                self._wake()

    def _feed(self, ids: Sequence[int]) -> None:
        """Adds tokens one by one, as text is or may have to be held back."""
        for token in ids:
            self._count += 1
            self._ids.append(token)
            text, released = self._text.feed(self._piece(token))
            self._released += released
            self._released_text += text
            if self._text.stopped_by is not None:
                self._cancel(self)
                break

    def deliver_progress(self, progress: PrefillProgress) -> None:
        """Sets the progress of the prefill; an earlier one that was not yielded is dropped. Called on the event
        loop."""
        self._progress = progress
        self._wake()

    def deliver_end(self, end: Finished | Failed) -> None:
        """Sets the terminal update; a second one is ignored. Called on the event loop."""
        if self._end is not None:
            return
        if isinstance(end, Finished):
            text, released = self._text.finish()
            self._released += released
            self._released_text += text
            end = self._stopped(end)
        self._end = end
        self._wake()

    def _wake(self) -> None:
        for waiter in (self._wakeup, self._ended if self._end is not None else None):
            if waiter is not None and not waiter.done():
                waiter.set_result(None)

    def _diverts(self) -> bool:
        """True if released tokens are passed on. No earlier update is left, since `__anext__` waits."""
        return self._wakeup is not None and not self._wakeup.done() and self._can_take()

    def _pass_on(self, update: Tokens) -> None:
        assert self._on_tokens is not None
        assert self._wakeup is not None
        try:
            self._on_tokens(update)
        except Exception as error:
            self._wakeup.set_exception(error)

    def _stopped(self, end: Finished) -> Finished:
        """Returns `end` with the reason and token count of an earlier stop string or call of `enough()`."""
        if not self.complete:
            return end
        stopped_by = self._text.stopped_by
        reason = FinishReason.LENGTH if stopped_by is None else FinishReason.STOP
        usage = msgspec.structs.replace(end.usage, completion=self._count - self._text.surplus)
        return msgspec.structs.replace(end, reason=reason, usage=usage, stop=stopped_by)

    def _take(self) -> Tokens:
        count = self._released
        update = Tokens(
            tuple(self._ids[:count]),
            self._released_text,
            tuple(self._logprobs[:count]),
            tuple(self._origins[:count]),
        )
        del self._ids[:count], self._logprobs[:count], self._origins[:count]
        self._released, self._released_text = 0, ""
        return update


def _never() -> bool:
    return False


def count_by_owner(generations: Iterable[Generation]) -> dict[str, tuple[int, int]]:
    """Returns for each owner the numbers of its requests that have started, and of those that have not."""
    counts: dict[str, tuple[int, int]] = {}
    for generation in generations:
        started, queued = counts.get(generation.request.owner, (0, 0))
        has_started = generation.slot >= 0
        counts[generation.request.owner] = (started + has_started, queued + (not has_started))
    return counts
