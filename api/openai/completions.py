"""POST /v1/completions."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from api.generation.choices import Choices, Writer, asked_of, check_count, respond
from api.generation.constraints import constraint_of, grammar_of
from api.generation.loaded_model import Served, Site
from api.http.events import event
from api.http.request_context import exchange_of
from api.schema.logprobs import Offsets
from api.schema.replies import TextChoice
from api.schema.requests import TextRequest
from engine import Finished, Logprob, Tokens

DEFAULT_LIMIT = 16
"""New tokens if the client does not say: OpenAI's number, kept by vLLM."""

_DECODER = msgspec.json.Decoder(TextRequest)


class Text:
    """The endpoint."""

    def __init__(self, site: Site) -> None:
        self._site = site

    async def complete(self, request: Request) -> Response:
        """Continuations of one or more prompts; choice i of prompt p has index p * n + i."""
        served = self._site.open
        asked = await asked_of(request, served, _DECODER)
        constraint = constraint_of(asked)
        texts = asked.prompts
        prompts = await tokens_of(served, texts)
        choices = Choices(
            served,
            exchange_of(request.scope),
            asked,
            prompts,
            limit=DEFAULT_LIMIT if asked.limit is None else asked.limit,
            logprobs=asked.logprobs,
            prediction=await served.prompts.of_prediction(asked.prediction),
            grammar=await grammar_of(served.engine, constraint),
        )
        echoes = [
            (text if isinstance(text, str) else served.prompts.text_of(text)) if asked.echo else ""
            for text in texts
            for _ in range(choices.n)
        ]
        return respond(asked, choices, TextWriter(served, asked, echoes), served.options.server.sse_ping)


async def tokens_of(served: Served, prompts: Sequence[str | list[int]]) -> list[tuple[int, ...]]:
    """The tokens of prompts, each text or tokens. Raises RequestRefused, also if they are too many."""
    check_count(served, len(prompts), 1)
    found: list[tuple[int, ...]] = []
    for each in prompts:
        await asyncio.sleep(0)  # others go on between two
        found.append(await served.prompts.of_text(each) if isinstance(each, str) else tuple(each))
    return found


class TextWriter(Writer):
    """Text chunks; the first of each choice begins with its echo."""

    def __init__(self, served: Served, asked: TextRequest, echoes: Sequence[str]) -> None:
        super().__init__(served, asked, "text_completion", "cmpl-")
        self._echoes = list(echoes)
        self._top = asked.logprobs or 0
        self._offsets = [Offsets(served.engine.vocab) for _ in echoes]
        self._choices = [(TextChoice(index, ""),) for index in range(len(echoes))]

    def tokens(self, index: int, update: Tokens) -> bytes:
        if not update.text and not update.logprobs:
            return b""
        self.chunk.choices = choices = self._choices[index]
        choice = choices[0]
        choice.text = self._echo(index) + update.text
        choice.logprobs = self._offsets[index].logprobs(update.logprobs, self._top) if update.logprobs else None
        return event(self.chunk)

    def end(self, index: int, end: Finished) -> None:
        self.chunk.choices = choices = self._choices[index]
        choice = choices[0]
        choice.text = self._echo(index)
        choice.logprobs = None
        choice.finish_reason = end.reason

    def whole(self, index: int, text: str, logprobs: Sequence[Logprob], end: Finished) -> TextChoice:
        told = self._offsets[index].logprobs(logprobs, self._top) if logprobs else None
        return TextChoice(index, self._echo(index) + text, told, end.reason)

    def _echo(self, index: int) -> str:
        """The prompt, the first time."""
        echo, self._echoes[index] = self._echoes[index], ""
        return echo
