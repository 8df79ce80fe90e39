"""POST /infill: completes the text in a gap, in llama-server's shape."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta, Struct
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from api.generation.choices import read_generation_request
from api.generation.loaded_model import AppState, LoadedModel
from api.http.error_responses import EndpointDisabled
from api.llama_server.completion import complete_prompts
from api.llama_server.completion_schema import LlamaCompletionRequest, MixedPrompt
from api.templates.infill import InfillFile, InfillText, infill_context, infill_prompt, missing_fim_tokens

# The name of a file without one, as in llama-server.
_DEFAULT_FILE_NAME = "tmp"
# Tokens that mark the parts of a prompt: BOS, prefix, suffix, middle.
_MARK_TOKENS = 4
# The maximum share of a request's context that is kept free for the text in the gap.
_FREE_SHARE = 0.25


class ExtraFile(Struct):
    """A file in `input_extra`."""

    text: str
    filename: str | None = None


class InfillRequest(LlamaCompletionRequest, kw_only=True):
    """Request body of POST /infill."""

    # The prompt is the beginning of the text in the gap, and optional.
    prompt: str | None = None  # type: ignore[assignment]
    input_prefix: str | MixedPrompt
    input_suffix: str | MixedPrompt
    input_extra: Annotated[list[ExtraFile], Meta(max_length=1024)] | None = None


_DECODER = msgspec.json.Decoder(InfillRequest)


class InfillEndpoint:
    """The endpoint POST /infill."""

    def __init__(self, state: AppState) -> None:
        self._state = state

    async def fill(self, request: HTTPRequest) -> Response:
        """Returns completions of the gap. Raises EndpointDisabled if the model has no tokens that mark a gap."""
        model = self._state.model
        if missing := missing_fim_tokens(model.engine.info.fim):
            raise EndpointDisabled(f"Infill is not supported by this model: it has no token for {missing}.")
        body = await read_generation_request(request, model, _DECODER)
        return await complete_prompts(model, request, body, [list(await _tokenize(model, body))])


async def _tokenize(model: LoadedModel, body: InfillRequest) -> tuple[int, ...]:
    """Returns the prompt, cut so that it fits the context with the new tokens.

    The text around the gap gets at most `--batch-size` tokens, as in llama-server, and other files get the rest.
    """
    prompts, engine, fim = model.prompts, model.engine, model.engine.info.fim
    text = InfillText(
        await _tokens_of(model, body.input_prefix),
        await _tokens_of(model, body.input_suffix),
        await prompts.tokenize_text(body.prompt or "", add_special=False, parse_special=True),
    )
    files = [InfillFile(file.filename or _DEFAULT_FILE_NAME, file.text) for file in body.input_extra or ()]
    context = await infill_context(prompts, fim, files)
    room = engine.request_limit - _MARK_TOKENS - _free_tokens(body.token_limit, engine.request_limit)
    text = text.cut(min(model.options.batch.rows, room))
    extra = max(0, room - sum(map(len, text)))
    return infill_prompt(
        fim,
        engine.vocab.added[0],
        text,
        context=context[max(0, len(context) - extra) :],
        suffix_first=model.options.server.spm_infill,
    )


async def _tokens_of(model: LoadedModel, text: str | MixedPrompt) -> list[int]:
    parts = [text] if isinstance(text, str) else text
    return await model.prompts.tokenize_parts(parts, add_special=False, parse_special=False)


def _free_tokens(token_limit: int | None, limit: int) -> int:
    """Returns the number of tokens that the prompt leaves free in a context of `limit` tokens."""
    free = int(_FREE_SHARE * limit)
    return free if token_limit is None or token_limit < 0 else min(token_limit, free)
