"""POST /completion, llama-server's own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

import anyio.to_thread
import msgspec
from msgspec import UNSET
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from api.generation.choices import Choices, asked_of, check_count
from api.generation.constraints import constraint_of, grammar_of
from api.generation.loaded_model import Served, Site
from api.http.events import Body, event
from api.http.request_context import exchange_of
from api.http.responses import Answer, Emit, EventStream
from api.llama_server.completion_schema import (
    NativeChunk,
    NativeReply,
    NativeRequest,
    Pieces,
    Progress,
    PromptProgress,
    TokenProb,
    TopProb,
)
from api.llama_server.generation_settings import settings_of
from api.schema.logprobs import LEAST
from api.schema.replies import TimingsReply
from api.schema.requests import BIASES, Bias
from engine import Finished, FinishReason, Logprob, Reading, Request, RequestRefused, Tokens, Update, Vocab

_DECODER = msgspec.json.Decoder(NativeRequest)


class Native:
    """The endpoint."""

    def __init__(self, site: Site) -> None:
        self._site = site

    async def complete(self, request: HTTPRequest) -> Response:
        """Continuations of one or more prompts; choice i of prompt p has index p * n + i."""
        served = self._site.open
        asked = await asked_of(request, served, _DECODER)
        _check(asked, served)
        await _spell_out(asked, served.engine.vocab)
        constraint = constraint_of(asked)
        check_count(served, len(asked.prompts), asked.n or 1)
        choices = Choices(
            served,
            exchange_of(request.scope),
            asked,
            [await _tokens_of(served, prompt) for prompt in asked.prompts],
            limit=asked.limit,
            logprobs=asked.n_probs or None,
            prediction=await served.prompts.of_prediction(asked.prediction),
            grammar=await grammar_of(served.engine, constraint),
            progress=bool(asked.stream and asked.return_progress),
        )
        told = Told(served, asked, choices)
        if asked.stream:
            return EventStream(told.stream, served.options.server.sse_ping)
        return Answer(told.body)


def _check(asked: NativeRequest, served: Served) -> None:
    """Raises RequestRefused for what would silently not be met."""
    asked.refuse_unsupported()
    if asked.id_slot is not None and not -1 <= asked.id_slot < served.engine.slots:
        raise RequestRefused(f"id_slot: there are slots 0 to {served.engine.slots - 1}; -1 is any.", field="id_slot")
    batch = served.options.batch
    if batch.context_shift and asked.n_keep not in (None, batch.keep):
        raise RequestRefused(f"n_keep is the server's --keep here: {batch.keep}.", field="n_keep")
    if batch.context_shift and asked.n_discard:
        raise RequestRefused("n_discard is not supported, only 0: half of what may be forgotten.", field="n_discard")
    if asked.cache_prompt is False:
        asked.cache_salt = uuid4().hex  # nobody else's prefix has it


async def _spell_out(asked: NativeRequest, vocab: Vocab) -> None:
    """Biases of texts become those of their tokens. Raises RequestRefused for too much text."""
    biases = asked.logit_bias
    if not isinstance(biases, list):
        return
    texts = [token for token, _ in biases if isinstance(token, str)]
    if sum(map(len, texts)) > BIASES:
        raise RequestRefused(f"The texts in logit_bias have more than {BIASES} characters.", field="logit_bias")
    if texts:
        asked.logit_bias = await anyio.to_thread.run_sync(_of_tokens, biases, vocab)


def _of_tokens(biases: Sequence[Bias], vocab: Vocab) -> list[Bias]:
    return [
        (each, bias)
        for token, bias in biases
        for each in (vocab.tokenize(token, special=False) if isinstance(token, str) else (token,))
    ]


async def _tokens_of(served: Served, prompt: str | Pieces) -> tuple[int, ...]:
    """The tokens of a prompt; what the model wants before a text comes before it if it begins with one."""
    if isinstance(prompt, str):
        return await served.prompts.of_text(prompt)
    return tuple(await served.prompts.of_pieces(prompt, add=True, parse=True))


class Told:
    """One HTTP request's choices, told as they come or as a whole."""

    def __init__(self, served: Served, asked: NativeRequest, choices: Choices) -> None:
        self._asked = asked
        self._choices = choices
        self._each = [
            Choice(served, asked, index, _settings(asked, request, choices.seed), request.prompt)
            for index, request in enumerate(choices.requests)
        ]

    async def stream(self, emit: Emit) -> None:
        """An event for each step with something new, and one for each end."""

        async def tell(index: int, update: Update) -> None:
            choice = self._each[index]
            if isinstance(update, Finished):
                await emit(event(self._shaped(choice.end(update))))
            elif update.reading is not None:
                await emit(event(choice.progress(update.reading)))
            else:
                await emit(event(choice.chunk(update)))
                self._mind(index)

        await self._choices.run(tell)

    async def body(self) -> Body:
        """The choice, or a list of them if there are several."""

        async def tell(index: int, update: Update) -> None:
            if isinstance(update, Tokens):
                self._each[index].add(update)
                self._mind(index)

        await self._choices.run(tell)
        ends = [end for group in self._choices.ends for end in group]
        replies = [self._shaped(choice.end(end)) for choice, end in zip(self._each, ends, strict=True)]
        return replies if len(replies) > 1 else replies[0]

    def _mind(self, index: int) -> None:
        """Ends the choice if it has had its time; as with llama-server, not within its first line."""
        choice, most = self._each[index], self._asked.t_max_predict_ms
        if most is not None and most > 0 and choice.has_new_line and choice.milliseconds > most:
            self._choices.enough(index)

    def _shaped(self, reply: NativeReply) -> NativeReply | dict[str, Any]:
        return reply.only(self._asked.response_fields) if self._asked.response_fields else reply


def _settings(asked: NativeRequest, request: Request, seed: int) -> dict[str, object]:
    return settings_of(request, seed, stream=bool(asked.stream)) | {
        "samplers": asked.stages,
        "timings_per_token": bool(asked.timings_per_token),
        "grammar": asked.grammar or "",
        "json_schema": asked.json_schema,
    }


class Choice:
    """What one choice has said so far."""

    def __init__(
        self,
        served: Served,
        asked: NativeRequest,
        index: int,
        settings: dict[str, object],
        prompt: tuple[int, ...],
    ) -> None:
        self.has_new_line = False
        self._served = served
        self._asked = asked
        self._index = index
        self._settings = settings
        self._prompt = prompt
        self._texts: list[str] = []
        self._ids: list[int] = []
        self._probabilities: list[TokenProb] = []
        self._started: float | None = None

    @property
    def milliseconds(self) -> float:
        """Since its first token."""
        return 0.0 if self._started is None else (time.monotonic() - self._started) * 1e3

    def add(self, update: Tokens) -> None:
        """Takes what it says next."""
        if self._started is None:
            self._started = time.monotonic()
        self.has_new_line = self.has_new_line or "\n" in update.text
        self._ids += update.ids
        self._texts.append(update.text)
        self._probabilities += _probabilities(self._served.engine.vocab, update.logprobs)

    def progress(self, reading: Reading) -> NativeChunk:
        """An event before it says anything."""
        return NativeChunk(
            index=self._index,
            content="",
            tokens=(),
            tokens_predicted=0,
            tokens_evaluated=len(self._prompt),
            prompt_progress=PromptProgress.of(reading),
        )

    def chunk(self, update: Tokens) -> NativeChunk:
        """The same, as an event."""
        self.add(update)
        probabilities, self._probabilities = self._probabilities, []
        return NativeChunk(
            index=self._index,
            content=update.text,
            tokens=update.ids,
            tokens_predicted=len(self._ids),
            tokens_evaluated=len(self._prompt),
            timings=self._progress() if self._asked.timings_per_token else UNSET,
            completion_probabilities=probabilities or UNSET,
        )

    def end(self, end: Finished) -> NativeReply:
        """All that is known at the end; in a stream, the text and the tokens were told before."""
        stream, usage = self._asked.stream, end.usage
        stop_type, word = self._why(end)
        full = (
            end.reason is FinishReason.LENGTH and usage.prompt + usage.completion >= self._served.engine.request_limit
        )
        return NativeReply(
            index=self._index,
            content="" if stream else "".join(self._texts),
            tokens=self._ids if self._asked.return_tokens and not stream else (),
            model=self._served.name,
            tokens_predicted=usage.completion,
            tokens_evaluated=usage.prompt,
            generation_settings=self._settings,
            prompt=self._served.prompts.text_with_names_of(self._prompt),
            has_new_line=self.has_new_line,
            truncated=bool(end.forgotten) or (full and stop_type == "limit"),
            stop_type=stop_type,
            stopping_word=word,
            tokens_cached=usage.prompt + max(0, usage.completion - 1) - end.forgotten,
            timings=TimingsReply.of([[end]]),
            completion_probabilities=UNSET if stream else self._probabilities or UNSET,
        )

    def _why(self, end: Finished) -> tuple[str, str]:
        """The type of its end, and the word that was met."""
        if end.reason is FinishReason.LENGTH:
            return "limit", ""
        if isinstance(end.stop, str):
            return "word", end.stop
        if end.stop is not None and end.stop in (self._asked.stop_token_ids or ()):
            return "word", self._served.engine.vocab.text(end.stop)
        return "eos", ""

    def _progress(self) -> Progress:
        count, milliseconds = len(self._ids), self.milliseconds
        timed = max(0, count - 1)  # the first came with the prompt
        return Progress(
            count,
            milliseconds,
            milliseconds / timed if timed else 0.0,
            timed / milliseconds * 1e3 if milliseconds else 0.0,
        )


def _probabilities(vocab: Vocab, logprobs: Sequence[Logprob]) -> list[TokenProb]:
    """Log probabilities as llama-server tells them."""
    return [
        TokenProb(
            *_named(vocab, entry.token, entry.logprob),
            [TopProb(*_named(vocab, token, logprob)) for token, logprob in entry.top],
        )
        for entry in logprobs
    ]


def _named(vocab: Vocab, token: int, logprob: float) -> tuple[int, str, list[int], float]:
    piece = vocab.piece(token)
    return token, piece.decode("utf-8", "replace"), list(piece), max(LEAST, logprob)
