"""POST /completion in llama-server's shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from api.generation.choices import Choices, check_choice_count, read_generation_request
from api.generation.constraints import compile_constraint, parse_constraint
from api.generation.loaded_model import AppState, LoadedModel
from api.http.events import JSONBody, sse_event
from api.http.request_context import request_context
from api.http.responses import EventStream, EventStreamResponse, PendingJSONResponse
from api.llama_server.completion_schema import LlamaCompletionRequest, MixedPrompt
from api.schema.completion_replies import LlamaCompletionReply
from api.schema.request_values import PromptObject
from engine import Finished, MediaPrompt, Update

_DECODER = msgspec.json.Decoder(LlamaCompletionRequest)


class CompletionEndpoint:
    """The endpoint POST /completion."""

    def __init__(self, state: AppState) -> None:
        self._state = state

    async def complete(self, request: HTTPRequest) -> Response:
        """Returns completions of one or more prompts; choice i of prompt p has index p * n + i."""
        model = self._state.model
        body = await read_generation_request(request, model, _DECODER)
        return await complete_prompts(model, request, body, body.prompts)


async def complete_prompts(
    model: LoadedModel,
    request: HTTPRequest,
    body: LlamaCompletionRequest,
    prompts: Sequence[str | PromptObject | MixedPrompt],
) -> Response:
    """Returns completions of `prompts` with the parameters of `body`, as a stream or as a body."""
    constraint = parse_constraint(body)
    check_choice_count(model, len(prompts), body.n or 1)
    read = await _read_prompts(model, prompts, "prompt[{}]" if isinstance(body.prompt, list) else "prompt")
    choices = Choices(
        model,
        request_context(request.scope),
        body,
        [prompt.tokens for prompt in read],
        media=[prompt.runs for prompt in read],
        token_limit=body.token_limit,
        logprobs=body.num_logprobs,
        prediction=await model.prompts.tokenize_prediction(body.prediction),
        grammar=await compile_constraint(model.engine, constraint),
    )
    replies = _Replies(body, choices)
    if body.stream:
        return EventStreamResponse(replies.stream, model.options.server.sse_ping)
    return PendingJSONResponse(replies.body)


async def _read_prompts(
    model: LoadedModel, prompts: Sequence[str | PromptObject | MixedPrompt], path: str
) -> list[MediaPrompt]:
    """Returns the tokens and the images and sounds of each prompt. `path` has braces in place of a prompt's index."""
    files = [each.multimodal_data or () for each in prompts if isinstance(each, PromptObject)]
    model.prompts.media.check_count(sum(map(len, files)), "prompt")
    return [await _read_prompt(model, prompt, path.format(index)) for index, prompt in enumerate(prompts)]


async def _read_prompt(model: LoadedModel, prompt: str | PromptObject | MixedPrompt, path: str) -> MediaPrompt:
    """Returns a prompt. In a mixed list, BOS and EOS are added only around a text that is the first item."""
    if isinstance(prompt, PromptObject):
        if prompt.multimodal_data:
            return await model.prompts.media.read_prompt(prompt, path)
        prompt = prompt.prompt_string
    if isinstance(prompt, str):
        return MediaPrompt(await model.prompts.tokenize_prompt(prompt), ())
    return MediaPrompt(tuple(await model.prompts.tokenize_parts(prompt, add_special=True, parse_special=True)), ())


class _Replies:
    """The replies of one HTTP request, as a stream or as a body."""

    def __init__(self, body: LlamaCompletionRequest, choices: Choices) -> None:
        self._body = body
        self._choices = choices

    async def stream(self, stream: EventStream) -> None:
        """Sends one event for each update and one for the end of each choice."""
        await self._choices.run(self._encode, stream)

    def _encode(self, index: int, update: Update) -> bytes:
        output = self._choices.outputs[index]
        if isinstance(update, Finished):
            return sse_event(self._selected(output.reply(update)))
        if update.prefill_progress is None:
            return sse_event(output.chunk(update))
        if not self._body.return_progress:
            return b""
        reports = output.new_progress(update.prefill_progress)
        return b"".join(sse_event(output.progress_chunk(progress)) for progress in reports)

    async def body(self) -> JSONBody:
        """Returns the reply of the only choice, or a list with the replies of several choices."""
        await self._choices.run()
        ends = self._choices.finished
        replies = [self._selected(output.reply(end)) for output, end in zip(self._choices.outputs, ends, strict=True)]
        return replies if len(replies) > 1 else replies[0]

    def _selected(self, reply: LlamaCompletionReply) -> LlamaCompletionReply | dict[str, Any]:
        return reply.selected(self._body.response_fields) if self._body.response_fields else reply
