"""The endpoints of the Responses API: /v1/responses and the paths below it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any
from uuid import uuid4

import msgspec
from msgspec import UNSET, Struct
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from api.generation.chat_choices import chat_choices
from api.generation.choices import Choices, read_generation_request
from api.generation.loaded_model import AppState, LoadedModel
from api.generation.prepared_chat import PreparedChat, prepare_chat
from api.http.request_context import request_context
from api.http.responses import EventStreamResponse, JSONResponse, PendingJSONResponse
from api.openai.render import InputTokensReply
from api.openai.responses.chat_form import ChatForm
from api.openai.responses.conversation import ChatConversation
from api.openai.responses.input_items import ItemPage
from api.openai.responses.output import OutputBuilder
from api.openai.responses.reply import DeletedResponse, ReasoningReply, ResponseReply
from api.openai.responses.request import ResponsesRequest, TextFormat, TextOptions
from api.openai.responses.run import ResponseRun
from api.openai.responses.store import ResponseStore, decoded_items
from engine import ContextExceeded, RequestRefused

_DECODER = msgspec.json.Decoder(ResponsesRequest)

# Part of the context that `truncation: auto` leaves to the output at most, as a divisor.
_OUTPUT_SHARE = 2


class ResponseTurn(Struct, frozen=True):
    """A request with the conversation that it continues."""

    form: ChatForm
    chat: PreparedChat
    previous: Sequence[bytes]
    """The encoded items of the responses before."""
    new: Sequence[Mapping[str, Any]]
    """The items of the request."""


class ResponsesEndpoints:
    """The endpoints of the Responses API, which share the stored responses."""

    def __init__(self, state: AppState) -> None:
        self._state = state
        self._store = ResponseStore(state.config.response_store * 2**20)

    async def create(self, http_request: HTTPRequest) -> Response:
        """Generates one response."""
        model, context = self._state.model, request_context(http_request.scope)
        request = await read_generation_request(http_request, model, _DECODER)
        request.refuse_foreign()
        turn = await self._turn(request, model, context.namespace)
        with turn.form.paths():
            choices = await chat_choices(model, context, turn.form.request, turn.chat, progress=bool(request.stream))
        stores = self._store.enabled and request.store is not False
        output = OutputBuilder(
            turn.chat.parser(),
            turn.form.called_tools(),
            summary=request.wants_summary,
            encodes_reasoning=request.wants_encrypted_reasoning,
        )
        reply = _new_reply(request, model, choices, turn.form, stores=stores)

        def on_finished(reply: ResponseReply) -> ResponseReply:
            stored = stores and self._store.put(context.namespace, reply, turn.previous, turn.new)
            return msgspec.structs.replace(reply, store=stored)

        run = ResponseRun(model, context, request, turn.form, choices, reply, output, on_finished)
        if request.stream:
            return EventStreamResponse(run.stream, model.options.server.sse_ping)
        return PendingJSONResponse(run.body)

    async def input_tokens(self, http_request: HTTPRequest) -> Response:
        """Returns the number of tokens of the prompt, which may be longer than the context."""
        model, context = self._state.model, request_context(http_request.scope)
        request = await read_generation_request(http_request, model, _DECODER)
        request.refuse_foreign()
        turn = await self._turn(request, model, context.namespace)
        return JSONResponse(InputTokensReply(len(turn.chat.prompt)))

    async def retrieve(self, http_request: HTTPRequest) -> Response:
        """Returns a stored response. Raises HTTPException 404."""
        if http_request.query_params.get("stream", "false") != "false":
            raise RequestRefused("stream: stored responses are not streamed; leave the parameter out.", field="stream")
        id = http_request.path_params.get("id", "")  # empty for the path with a slash at its end
        stored = self._store.get(request_context(http_request.scope).namespace, id)
        return Response(stored.body, media_type="application/json")

    async def delete(self, http_request: HTTPRequest) -> Response:
        """Drops a stored response. Raises HTTPException 404."""
        id = http_request.path_params["id"]
        self._store.delete(request_context(http_request.scope).namespace, id)
        return JSONResponse(DeletedResponse(id))

    async def input_items(self, http_request: HTTPRequest) -> Response:
        """Returns a page of the input items of a stored response, the conversation before it included."""
        page = ItemPage.from_query(http_request.query_params)
        stored = self._store.get(request_context(http_request.scope).namespace, http_request.path_params["id"])
        return JSONResponse(page.of(decoded_items(stored.input)))

    async def _turn(self, request: ResponsesRequest, model: LoadedModel, namespace: str) -> ResponseTurn:
        """Returns the prepared chat of the request's conversation. Raises RequestRefused with the field."""
        previous = self._store.previous(namespace, request.previous_response_id)
        if request.input is None and not previous:
            raise RequestRefused("input: the field is missing; expected a string or a list", field="input")
        new = self._store.resolved_items(namespace, request.input or [])
        conversation = ChatConversation(request.instructions)
        conversation.add(decoded_items(previous), "previous_response_id", indexed=False)
        conversation.add(new, "input")
        if not conversation.messages:
            raise RequestRefused("input: the conversation has no messages; send at least one.", field="input")
        form, chat = await _prepare(request, conversation, model)
        return ResponseTurn(form, chat, previous, new)


async def _prepare(
    request: ResponsesRequest, conversation: ChatConversation, model: LoadedModel
) -> tuple[ChatForm, PreparedChat]:
    """Returns the chat of a conversation; with `truncation: auto` without the oldest turns if it is too long.

    Raises RequestRefused with the field.
    """

    async def prepared(start: int) -> tuple[ChatForm, PreparedChat]:
        form = ChatForm(request, conversation.cut(start))
        with form.paths():
            return form, await prepare_chat(form.request, model.prompts)

    async def fitting(start: int) -> tuple[ChatForm, PreparedChat] | None:
        with suppress(ContextExceeded):
            candidate = await prepared(start)
            if len(candidate[1].prompt) <= limit:
                return candidate
        return None

    limit = model.engine.request_limit
    limit -= min(max(request.output_limit or 0, 1), limit // _OUTPUT_SHARE)
    if request.truncation != "auto":
        return await prepared(0)
    if whole := await fitting(0):
        return whole
    # The length decreases with the start, so the first start that fits is found by bisection.
    cuts, shortest = conversation.cuts(), None
    low, high = 0, len(cuts)
    while low < high:
        middle = (low + high) // 2
        if candidate := await fitting(cuts[middle]):
            shortest, high = candidate, middle
        else:
            low = middle + 1
    return shortest or await prepared(0)


def _new_reply(
    request: ResponsesRequest, model: LoadedModel, choices: Choices, form: ChatForm, *, stores: bool
) -> ResponseReply:
    """Returns the response before its first token, with the effective values of the request's fields."""
    sampling = choices.requests[0].sampling
    reasoning = request.reasoning
    text = request.text or TextOptions()
    return ResponseReply(
        id=f"resp_{uuid4().hex}",
        created_at=int(time.time()),
        instructions=request.instructions,
        max_output_tokens=request.output_limit,
        max_tool_calls=request.max_tool_calls,
        metadata=request.metadata or {},
        model=model.name,
        parallel_tool_calls=request.parallel_tool_calls is not False,
        previous_response_id=request.previous_response_id,
        prompt_cache_key=request.prompt_cache_key,
        reasoning=ReasoningReply(
            form.request.reasoning_effort, (reasoning.summary or reasoning.generate_summary) if reasoning else None
        ),
        safety_identifier=request.safety_identifier,
        store=stores,
        temperature=sampling.temperature,
        text=TextOptions(text.format or TextFormat("text"), text.verbosity),
        tool_choice="auto" if request.tool_choice is None else request.tool_choice,
        tools=[_echoed_tool(tool) for tool in request.tools or ()],
        top_logprobs=request.top_logprobs or 0,
        top_p=sampling.top_p,
        truncation=request.truncation or "disabled",
        user=request.user,
        warnings=form.warnings or UNSET,
        seed=choices.seed,
    )


def _echoed_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a tool of the request, with the defaults of a function."""
    defaults = {"description": None, "parameters": None, "strict": False} if tool.get("type") == "function" else {}
    return {**defaults, **tool}
