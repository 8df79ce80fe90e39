"""POST /v1/completions."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec
from msgspec import UNSET
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from api.generation.choices import Choices, check_choice_count, read_generation_request
from api.generation.constraints import compile_constraint, parse_constraint
from api.generation.loaded_model import AppState, LoadedModel
from api.generation.openai_replies import ReplyBuilder, respond
from api.http.events import sse_event
from api.http.request_context import request_context
from api.schema.logprobs import TextLogprobsBuilder
from api.schema.replies import TextChoice
from api.schema.requests import TextRequest
from api.schema.token_origins import token_origins
from api.templates.infill import InfillText, infill_prompt, missing_fim_tokens
from engine import Finished, Logprob, RequestRefused, Tokens

# Maximum new tokens of a request without a limit, as in OpenAI's API and in vLLM.
DEFAULT_MAX_TOKENS = 16

_DECODER = msgspec.json.Decoder(TextRequest)


class TextCompletionEndpoint:
    """The endpoint POST /v1/completions."""

    def __init__(self, state: AppState) -> None:
        self._state = state

    async def create(self, http_request: HTTPRequest) -> Response:
        """Generates `n` continuations of each prompt; choice i of prompt p has index p * n + i."""
        model = self._state.model
        request = await read_generation_request(http_request, model, _DECODER)
        constraint = parse_constraint(request)
        texts = request.prompts
        choices = Choices(
            model,
            request_context(http_request.scope),
            request,
            await tokenize_prompts(model, texts, request.suffix),
            token_limit=DEFAULT_MAX_TOKENS if request.token_limit is None else request.token_limit,
            logprobs=request.num_logprobs,
            prediction=await model.prompts.tokenize_prediction(request.prediction),
            grammar=await compile_constraint(model.engine, constraint),
        )
        echoes = [
            (text if isinstance(text, str) else model.prompts.plain_text(text)) if request.echo else ""
            for text in texts
            for _ in range(choices.n)
        ]
        return respond(request, choices, TextReplyBuilder(model, request, echoes), model.options.server.sse_ping)


async def tokenize_prompts(
    model: LoadedModel, prompts: Sequence[str | list[int]], suffix: str | None = None
) -> list[tuple[int, ...]]:
    """Returns the token ids of `prompts`, each a text or token ids. With `suffix`, the continuation of a prompt fills
    the gap between its text and the suffix.

    Raises RequestRefused for too many prompts, and for a suffix if the model has no tokens that mark a gap.
    """
    check_choice_count(model, len(prompts), 1)
    suffix_tokens = await _tokenize_suffix(model, suffix) if suffix else None
    tokenized: list[tuple[int, ...]] = []
    for prompt in prompts:
        await asyncio.sleep(0)  # lets the event loop serve other requests between two prompts
        if suffix_tokens is not None:
            tokens = await _around_gap(model, prompt, suffix_tokens)
        else:
            tokens = await model.prompts.tokenize_prompt(prompt) if isinstance(prompt, str) else tuple(prompt)
        tokenized.append(tokens)
    return tokenized


async def _tokenize_suffix(model: LoadedModel, suffix: str) -> list[int]:
    if missing := missing_fim_tokens(model.engine.info.fim):
        raise RequestRefused(
            f"suffix: this model has no token for {missing}, so it cannot insert text; leave the field out.",
            field="suffix",
        )
    return await model.prompts.tokenize_text(suffix, add_special=False, parse_special=False)


async def _around_gap(model: LoadedModel, prompt: str | list[int], suffix: Sequence[int]) -> tuple[int, ...]:
    """Returns a fill-in-the-middle prompt. Names of special tokens in a text are plain text, as they are in code."""
    prefix = (
        await model.prompts.tokenize_text(prompt, add_special=False, parse_special=False)
        if isinstance(prompt, str)
        else prompt
    )
    suffix_first = model.options.server.spm_infill
    engine = model.engine
    return infill_prompt(engine.info.fim, engine.vocab.added[0], InfillText(prefix, suffix), suffix_first=suffix_first)


class TextReplyBuilder(ReplyBuilder):
    """Builds text chunks and choices. The first chunk of a choice begins with the echo of the prompt."""

    def __init__(self, model: LoadedModel, request: TextRequest, echoes: Sequence[str]) -> None:
        """`echoes` has the text to echo for each choice; the texts are empty if the request has no `echo`."""
        super().__init__(model, request, "text_completion", "cmpl-")
        self._echoes = list(echoes)
        self._vocab = model.engine.vocab
        self._top_logprobs = request.num_logprobs or 0
        self._logprobs = [TextLogprobsBuilder(model.engine.vocab) for _ in echoes]
        self._choices = [(TextChoice(index, ""),) for index in range(len(echoes))]

    def full_event(self, index: int, update: Tokens) -> bytes:
        self.chunk.choices = choices = self._choices[index]
        choice = choices[0]
        choice.text = self._take_echo(index) + update.text
        choice.logprobs = self._logprobs[index].build(update.logprobs, self._top_logprobs) if update.logprobs else None
        choice.token_origins = token_origins(self._vocab, update.ids, update.origins)
        return sse_event(self.chunk)

    def progress_event(self, index: int) -> bytes:
        self.chunk.choices = (TextChoice(index, ""),)
        return sse_event(self.chunk)

    def set_final_chunk(self, index: int, end: Finished) -> None:
        self.chunk.choices = choices = self._choices[index]
        choice = choices[0]
        choice.text = self._take_echo(index)
        choice.logprobs, choice.token_origins = None, UNSET
        choice.finish_reason = end.reason

    def whole_choice(self, index: int, text: str, logprobs: Sequence[Logprob], end: Finished) -> TextChoice:
        reply_logprobs = self._logprobs[index].build(logprobs, self._top_logprobs) if logprobs else None
        return TextChoice(index, self._take_echo(index) + text, reply_logprobs, end.reason)

    def _take_echo(self, index: int) -> str:
        """Returns the echo of the choice at the first call, and an empty text afterwards."""
        echo, self._echoes[index] = self._echoes[index], ""
        return echo
