"""A Generation by itself: text, merging, stop strings, logprobs, and exactly one end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.contract import EngineFault, Failed, Finished, FinishReason, Logprob, Request, Timings, Tokens, Usage
from engine.generation import Generation

END = Finished(FinishReason.LENGTH, Usage(1, 0, 99), Timings(0, 0, 0), 1)


class Recorder:
    """Builds a Generation whose tokens are the bytes of a text, and records its calls."""

    def __init__(self, *stops: str) -> None:
        self.calls: list[str] = []
        self.generation = Generation(
            Request(prompt=(1,), stop=stops),
            lambda token: bytes([token]),
            lambda _: self.calls.append("submit"),
            lambda _: self.calls.append("cancel"),
        )

    async def read(self) -> tuple[str, list[int], Finished]:
        text = ""
        ids: list[int] = []
        async for update in self.generation:
            if isinstance(update, Finished):
                return text, ids, update
            text += update.text
            ids += update.ids
        raise AssertionError("no end")


@given(st.lists(st.integers(1, 5), max_size=30))
async def test_the_text_does_not_depend_on_the_grouping_of_tokens(sizes: list[int]) -> None:
    data = "naïve 👩‍👩‍👧 STO and STOP then more".encode()
    recorder = Recorder("STOP")
    for size in [*sizes, len(data)]:
        recorder.generation.deliver_tokens(data[:size])
        data = data[size:]
    recorder.generation.deliver_end(END)
    text, ids, end = await recorder.read()
    assert text == "naïve 👩‍👩‍👧 STO and "
    assert bytes(ids).decode() == text
    assert end.reason is FinishReason.STOP
    assert end.stop == "STOP"
    assert end.usage.completion == len((text + "STOP").encode())
    assert recorder.calls == ["cancel"]


async def test_a_cut_character_shows_as_a_replacement() -> None:
    recorder = Recorder()
    recorder.generation.deliver_tokens("é".encode()[:1])
    recorder.generation.deliver_end(END)
    text, ids, _ = await recorder.read()
    assert text == "\ufffd"
    assert len(ids) == 1


async def test_logprobs_come_with_their_text_and_not_for_a_stop_string() -> None:
    recorder = Recorder("cd")
    entries = [Logprob(token, -float(token)) for token in b"abcde"]
    recorder.generation.deliver_tokens(b"abc", entries[:3])
    first = await anext(recorder.generation)
    assert isinstance(first, Tokens)
    assert first == Tokens(tuple(b"ab"), "ab", tuple(entries[:2]))
    recorder.generation.deliver_tokens(b"de", entries[3:])
    recorder.generation.deliver_end(END)
    assert [update async for update in recorder.generation][:-1] == []


async def test_entering_submits_and_leaving_cancels_only_before_the_end() -> None:
    recorder = Recorder()
    async with recorder.generation:
        pass
    assert recorder.calls == ["submit", "cancel"]
    ended = Recorder()
    async with ended.generation:
        ended.generation.deliver_end(END)
    assert ended.calls == ["submit"]


async def test_a_failure_is_raised_after_earlier_tokens() -> None:
    recorder = Recorder()
    recorder.generation.deliver_tokens(b"ab")
    recorder.generation.deliver_end(Failed(EngineFault("boom")))
    recorder.generation.deliver_end(END)
    first = await anext(recorder.generation)
    assert isinstance(first, Tokens)
    with pytest.raises(EngineFault, match="boom"):
        await anext(recorder.generation)
    with pytest.raises(StopAsyncIteration):
        await anext(recorder.generation)


async def test_a_generation_with_enough_keeps_its_tokens() -> None:
    recorder = Recorder("STOP")
    recorder.generation.deliver_tokens(b"all ST")
    recorder.generation.enough()
    recorder.generation.enough()
    recorder.generation.deliver_tokens(b"OP and more")
    recorder.generation.deliver_end(Finished(FinishReason.CANCELLED, Usage(1, 0, 17), Timings(0, 0, 0), 1))
    text, ids, end = await recorder.read()
    assert (text, bytes(ids)) == ("all ST", b"all ST")
    assert (end.reason, end.stop, end.usage.completion) == (FinishReason.LENGTH, None, 6)
    assert recorder.generation.complete
    assert recorder.calls == ["cancel"]
    recorder.generation.enough()
    assert recorder.calls == ["cancel"]
