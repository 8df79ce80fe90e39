"""POST /completion in llama-server's shape."""

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

from api.generation.choices import Choices, check_choice_count, read_generation_request
from api.generation.constraints import compile_constraint, parse_constraint
from api.generation.loaded_model import AppState, LoadedModel
from api.http.events import JSONBody, sse_event
from api.http.request_context import request_context
from api.http.responses import EventStreamResponse, PendingJSONResponse, SendEvents
from api.llama_server.completion_schema import (
    LlamaCompletionChunk,
    LlamaCompletionReply,
    LlamaCompletionRequest,
    MixedPrompt,
    PromptProgress,
    RunningTimings,
    TokenProb,
    TopProb,
)
from api.llama_server.generation_settings import request_settings
from api.schema.logprobs import MIN_LOGPROB
from api.schema.replies import TimingsReply
from api.schema.requests import MAX_LOGIT_BIASES, LogitBias
from engine import Finished, FinishReason, Logprob, PrefillProgress, Request, RequestRefused, Tokens, Update, Vocab

_DECODER = msgspec.json.Decoder(LlamaCompletionRequest)


class CompletionEndpoint:
    """The endpoint POST /completion."""

    def __init__(self, state: AppState) -> None:
        self._state = state

    async def complete(self, request: HTTPRequest) -> Response:
        """Returns completions of one or more prompts; choice i of prompt p has index p * n + i."""
        model = self._state.model
        body = await read_generation_request(request, model, _DECODER)
        _check_supported(body, model)
        if body.cache_prompt is False:
            body.cache_salt = uuid4().hex  # matches no cached prefix
        await _tokenize_biases(body, model.engine.vocab)
        constraint = parse_constraint(body)
        check_choice_count(model, len(body.prompts), body.n or 1)
        choices = Choices(
            model,
            request_context(request.scope),
            body,
            [await _tokenize_prompt(model, prompt) for prompt in body.prompts],
            token_limit=body.token_limit,
            logprobs=body.n_probs or None,
            prediction=await model.prompts.tokenize_prediction(body.prediction),
            grammar=await compile_constraint(model.engine, constraint),
            progress=bool(body.stream and body.return_progress),
        )
        replies = _Replies(model, body, choices)
        if body.stream:
            return EventStreamResponse(replies.stream, model.options.server.sse_ping)
        return PendingJSONResponse(replies.body)


def _check_supported(body: LlamaCompletionRequest, model: LoadedModel) -> None:
    """Raises RequestRefused for fields that would have no effect."""
    body.refuse_unsupported()
    if body.id_slot is not None and not -1 <= body.id_slot < model.engine.slots:
        raise RequestRefused(f"id_slot must be 0 to {model.engine.slots - 1}, or -1 for any slot.", field="id_slot")
    batch = model.options.batch
    if batch.context_shift and body.n_keep not in (None, batch.keep):
        raise RequestRefused(f"n_keep must be {batch.keep}, the server's --keep, or be omitted.", field="n_keep")
    if batch.context_shift and body.n_discard:
        raise RequestRefused(
            "n_discard must be 0: a context shift discards half of the tokens after n_keep.", field="n_discard"
        )


async def _tokenize_biases(body: LlamaCompletionRequest, vocab: Vocab) -> None:
    """Replaces each text in `logit_bias` by its tokens, in place. Raises RequestRefused for too much text."""
    biases = body.logit_bias
    if not isinstance(biases, list):
        return
    texts = [token for token, _ in biases if isinstance(token, str)]
    if sum(map(len, texts)) > MAX_LOGIT_BIASES:
        raise RequestRefused(
            f"The texts in logit_bias have more than {MAX_LOGIT_BIASES} characters, the maximum.", field="logit_bias"
        )
    if texts:
        body.logit_bias = await anyio.to_thread.run_sync(_token_biases, biases, vocab)


def _token_biases(biases: Sequence[LogitBias], vocab: Vocab) -> list[LogitBias]:
    return [
        (each, bias)
        for token, bias in biases
        for each in (vocab.tokenize(token, special=False) if isinstance(token, str) else (token,))
    ]


async def _tokenize_prompt(model: LoadedModel, prompt: str | MixedPrompt) -> tuple[int, ...]:
    """Returns the tokens of a prompt. In a list, BOS and EOS are added only around a text that is the first item."""
    if isinstance(prompt, str):
        return await model.prompts.tokenize_prompt(prompt)
    return tuple(await model.prompts.tokenize_parts(prompt, add_special=True, parse_special=True))


class _Replies:
    """The replies of one HTTP request, as a stream or as a body."""

    def __init__(self, model: LoadedModel, body: LlamaCompletionRequest, choices: Choices) -> None:
        self._body = body
        self._choices = choices
        self._states = [
            _Choice(model, body, index, _generation_settings(body, request, choices.seed), request.prompt)
            for index, request in enumerate(choices.requests)
        ]

    async def stream(self, send: SendEvents) -> None:
        """Sends one event for each update and one for the end of each choice."""

        async def on_update(index: int, update: Update) -> None:
            choice = self._states[index]
            if isinstance(update, Finished):
                await send(sse_event(self._selected(choice.reply(update))))
            elif update.prefill_progress is not None:
                await send(sse_event(choice.progress(update.prefill_progress)))
            else:
                await send(sse_event(choice.chunk(update)))
                self._check_time_limit(index)

        await self._choices.run(on_update)

    async def body(self) -> JSONBody:
        """Returns the reply of the only choice, or a list with the replies of several choices."""

        async def on_update(index: int, update: Update) -> None:
            if isinstance(update, Tokens):
                self._states[index].add(update)
                self._check_time_limit(index)

        await self._choices.run(on_update)
        ends = self._choices.finished
        replies = [self._selected(choice.reply(end)) for choice, end in zip(self._states, ends, strict=True)]
        return replies if len(replies) > 1 else replies[0]

    def _check_time_limit(self, index: int) -> None:
        """Ends the choice after `t_max_predict_ms`, but not in its first line, as in llama-server."""
        choice, limit = self._states[index], self._body.t_max_predict_ms
        if limit is not None and limit > 0 and choice.has_new_line and choice.milliseconds > limit:
            self._choices.enough(index)

    def _selected(self, reply: LlamaCompletionReply) -> LlamaCompletionReply | dict[str, Any]:
        return reply.selected(self._body.response_fields) if self._body.response_fields else reply


def _generation_settings(body: LlamaCompletionRequest, request: Request, seed: int) -> dict[str, object]:
    return request_settings(request, seed, stream=bool(body.stream)) | {
        "samplers": body.sampler_stages,
        "timings_per_token": bool(body.timings_per_token),
        "grammar": body.grammar or "",
        "json_schema": body.json_schema,
    }


class _Choice:
    """The output of one choice so far."""

    def __init__(
        self,
        model: LoadedModel,
        body: LlamaCompletionRequest,
        index: int,
        settings: dict[str, object],
        prompt: tuple[int, ...],
    ) -> None:
        self.has_new_line = False
        self._model = model
        self._body = body
        self._index = index
        self._generation_settings = settings
        self._prompt = prompt
        self._texts: list[str] = []
        self._tokens: list[int] = []
        self._probabilities: list[TokenProb] = []
        self._started: float | None = None

    @property
    def milliseconds(self) -> float:
        """Milliseconds since the first token."""
        return 0.0 if self._started is None else (time.monotonic() - self._started) * 1e3

    def add(self, update: Tokens) -> None:
        """Adds the tokens of one step."""
        if self._started is None:
            self._started = time.monotonic()
        self.has_new_line = self.has_new_line or "\n" in update.text
        self._tokens += update.ids
        self._texts.append(update.text)
        self._probabilities += _probabilities(self._model.engine.vocab, update.logprobs)

    def progress(self, progress: PrefillProgress) -> LlamaCompletionChunk:
        """Returns an event with the prefill progress."""
        return LlamaCompletionChunk(
            index=self._index,
            content="",
            tokens=(),
            tokens_predicted=0,
            tokens_evaluated=len(self._prompt),
            prompt_progress=PromptProgress.of(progress),
        )

    def chunk(self, update: Tokens) -> LlamaCompletionChunk:
        """Adds the tokens of one step and returns their event."""
        self.add(update)
        probabilities, self._probabilities = self._probabilities, []
        return LlamaCompletionChunk(
            index=self._index,
            content=update.text,
            tokens=update.ids,
            tokens_predicted=len(self._tokens),
            tokens_evaluated=len(self._prompt),
            timings=self._timings() if self._body.timings_per_token else UNSET,
            completion_probabilities=probabilities or UNSET,
        )

    def reply(self, end: Finished) -> LlamaCompletionReply:
        """Returns the final reply. In a stream its text and tokens are empty, because earlier events contained both."""
        stream, usage = self._body.stream, end.usage
        stop_type, word = self._stop_reason(end)
        context_full = (
            end.reason is FinishReason.LENGTH and usage.prompt + usage.completion >= self._model.engine.request_limit
        )
        return LlamaCompletionReply(
            index=self._index,
            content="" if stream else "".join(self._texts),
            tokens=self._tokens if self._body.return_tokens and not stream else (),
            model=self._model.name,
            tokens_predicted=usage.completion,
            tokens_evaluated=usage.prompt,
            generation_settings=self._generation_settings,
            prompt=self._model.prompts.detokenize(self._prompt),
            has_new_line=self.has_new_line,
            truncated=bool(end.discarded) or (context_full and stop_type == "limit"),
            stop_type=stop_type,
            stopping_word=word,
            tokens_cached=usage.prompt + max(0, usage.completion - 1) - end.discarded,
            timings=TimingsReply.of([[end]]),
            completion_probabilities=UNSET if stream else self._probabilities or UNSET,
        )

    def _stop_reason(self, end: Finished) -> tuple[str, str]:
        """Returns llama-server's stop type, and for type "word" the text of the stop string or stop token."""
        if end.reason is FinishReason.LENGTH:
            return "limit", ""
        if isinstance(end.stop, str):
            return "word", end.stop
        if end.stop is not None and end.stop in (self._body.stop_token_ids or ()):
            return "word", self._model.engine.vocab.text(end.stop)
        return "eos", ""

    def _timings(self) -> RunningTimings:
        count, milliseconds = len(self._tokens), self.milliseconds
        timed = max(0, count - 1)  # the time is measured from the first token
        return RunningTimings(
            count,
            milliseconds,
            milliseconds / timed if timed else 0.0,
            timed / milliseconds * 1e3 if milliseconds else 0.0,
        )


def _probabilities(vocab: Vocab, logprobs: Sequence[Logprob]) -> list[TokenProb]:
    """Returns log probabilities in llama-server's shape."""
    return [
        TokenProb(
            *_token_fields(vocab, entry.token, entry.logprob),
            [TopProb(*_token_fields(vocab, token, logprob)) for token, logprob in entry.top],
        )
        for entry in logprobs
    ]


def _token_fields(vocab: Vocab, token: int, logprob: float) -> tuple[int, str, list[int], float]:
    piece = vocab.piece(token)
    return token, piece.decode("utf-8", "replace"), list(piece), max(MIN_LOGPROB, logprob)
