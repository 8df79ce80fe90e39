"""Company and drafts do not change the text, on the real model.

In the deterministic profile tokens must be equal, not only likely so. Temperature is 0.8: the noise counts too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from engine import Engine, EngineConfig, Finished, Request, SamplingParams, Tokens, Usage
from engine.speculate import Draft
from tests.native.conftest import MODEL

CONFIG = EngineConfig.of(path=MODEL, slots=4, context=2048, deterministic=True)
TEXTS = ("Once upon a time", "def fibonacci(n):", "The three largest oceans are", "Dear Sir or Madam,")


def request(engine: Engine, text: str) -> Request:
    """Forty tokens after `text`, drawn with a seed of its own."""
    sampling = SamplingParams(seed=len(text), repeat_penalty=1.1)
    prompt = tuple(engine.vocab.tokenize(text, special=True))
    return Request(prompt=prompt, max_tokens=40, ignore_eos=True, sampling=sampling)


async def read(engine: Engine, asked: Request) -> tuple[list[int], Usage]:
    """The tokens of a request, and its usage."""
    ids: list[int] = []
    async with engine.generate(asked) as generation:
        async for update in generation:
            if isinstance(update, Finished):
                return ids, update.usage
            assert isinstance(update, Tokens)
            ids += update.ids
    raise AssertionError("no terminal update")


class Known:
    """Drafts what the request said before, every third token of it wrong if `wrong`."""

    def __init__(self, answers: dict[tuple[int, ...], list[int]], asked: Request, wrong: bool) -> None:
        self.whole = [*asked.prompt, *answers.get(asked.prompt, ())]
        self.wrong = wrong
        self.at = 0

    def begin(self, tokens: Sequence[int]) -> None:
        self.at = len(tokens)

    def propose(self, limit: int) -> Draft:
        rest = enumerate(self.whole[self.at : self.at + min(limit, 7)], self.at)
        return Draft([token + 1 if self.wrong and not place % 3 else token for place, token in rest])

    def observe(self, emitted: Sequence[int], drafted: int = 0, accepted: int = 0) -> None:
        self.at += len(emitted)

    def truncate(self, length: int) -> None:
        pass

    def shift(self, keep: int, discard: int) -> None:
        pass

    def end(self) -> None:
        pass


async def test_alone_together_again_and_drafted() -> None:
    answers: dict[tuple[int, ...], list[int]] = {}
    async with Engine.open(CONFIG) as engine:
        for text in TEXTS:
            asked = request(engine, text)
            answers[asked.prompt] = (await read(engine, asked))[0]
    async with Engine.open(CONFIG) as engine:
        requests = [request(engine, text) for text in TEXTS]
        together = await asyncio.gather(*(read(engine, asked) for asked in requests))
        assert [ids for ids, _ in together] == [answers[asked.prompt] for asked in requests]
        again, usage = await read(engine, requests[0])
        assert again == answers[requests[0].prompt]
        assert usage.cached == usage.prompt - 1, "what is shared says the same as what is computed"
    for wrong in (False, True):
        opened = Engine.open(CONFIG, speculate=lambda asked, wrong=wrong: {"known": Known(answers, asked, wrong)})  # type: ignore[misc]
        async with opened as engine:
            together = await asyncio.gather(*(read(engine, request(engine, text)) for text in TEXTS))
        assert [ids for ids, _ in together] == list(answers.values())
        for _, usage in together:
            assert usage.drafted > 20
            assert (usage.accepted == usage.drafted) is not wrong


@pytest.mark.parametrize("size", [1, 7, 40])
async def test_how_a_prompt_is_cut_does_not_change_the_text(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.pace import StepCost

    text = "It was the best of times, it was the worst of times, it was the age of wisdom, and so the story went"
    async with Engine.open(CONFIG) as engine:
        whole, _ = await read(engine, request(engine, text))
    monkeypatch.setattr(StepCost, "prompt_rows", lambda *_: size)
    async with Engine.open(CONFIG) as engine:
        assert (await read(engine, request(engine, text)))[0] == whole
