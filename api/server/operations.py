"""The body, reply and events of each endpoint, for the OpenAPI document."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from api.anthropic.errors import MessageErrorBody
from api.anthropic.messages import MessagesEndpoints
from api.anthropic.messages_schema import (
    ContentBlockDelta,
    ContentBlockStart,
    ContentBlockStop,
    MessageEnd,
    MessageReply,
    MessagesRequest,
    MessageStart,
    MessageStop,
    TokenCountReply,
)
from api.http.error_responses import ErrorBody
from api.llama_server.completion import CompletionEndpoint
from api.llama_server.completion_schema import LlamaCompletionRequest
from api.llama_server.infill import InfillEndpoint, InfillRequest
from api.llama_server.lora import LoraAdapterReply, LoraEndpoints, LoraScalesReply
from api.llama_server.props import Props
from api.llama_server.rerank import RerankEndpoint, RerankReply, RerankRequest, TeiResult
from api.llama_server.slots import (
    SlotEndpoints,
    SlotErasedReply,
    SlotFileRequest,
    SlotReply,
    SlotRestoredReply,
    SlotSavedReply,
)
from api.llama_server.tokenize import (
    ApplyTemplateReply,
    DetokenizeReply,
    DetokenizeRequest,
    LlamaTokenizeReply,
    LlamaTokenizeRequest,
    TokenizeChatRequest,
    TokenizeCompletionRequest,
    TokenizeEndpoints,
    TokenizeReply,
    TokenPiece,
)
from api.openai.chat import ChatCompletionEndpoint
from api.openai.completions import TextCompletionEndpoint
from api.openai.embeddings import EmbeddingEndpoints, EmbeddingReply, EmbeddingRequest, LlamaEmbeddingItem
from api.openai.render import InputTokensReply, RenderedPrompt, RenderEndpoints
from api.openai.responses.endpoint import ResponsesEndpoints
from api.openai.responses.reply import (
    CustomToolCallItem,
    DeletedResponse,
    FunctionCallItem,
    InputItemList,
    MessageItem,
    OutputEvent,
    OutputTextPart,
    ReasoningItem,
    ReasoningTextPart,
    ResponseEvent,
    ResponseReply,
    SummaryTextPart,
)
from api.openai.responses.request import ResponsesRequest
from api.schema.completion_replies import LlamaCompletionChunk, LlamaCompletionReply
from api.schema.replies import (
    ChatChoice,
    ChatChunkChoice,
    CompletionReply,
    HealthReply,
    ModelList,
    ModelReply,
    RunningUsage,
    TextChoice,
    UsageReply,
)
from api.schema.request_values import LoraScale
from api.schema.requests import ChatRequest, TextRequest
from api.server.predict import PredictEndpoint, Predictions, PredictRequest
from api.server.router_info import ProbeEndpoints
from api.server.status import StatusEndpoints
from api.ui.events import LiveEventsEndpoint
from api.ui.snapshot import LiveSnapshot

SCHEMA_PATH = "#/components/schemas/{name}"


class AnyOf(tuple[Any, ...]):
    """Types of which a value has one. msgspec has no schema of a union of structs without tags."""

    def __new__(cls, *types: Any) -> AnyOf:
        return super().__new__(cls, types)

    @property
    def schema(self) -> dict[str, Any]:
        """A schema that refers to those of the types, which are structs."""
        return {"anyOf": [{"$ref": SCHEMA_PATH.format(name=each.__name__)} for each in self]}


class Operation(Struct, frozen=True):
    """The types of an endpoint."""

    reply: Any
    """Type of the body, an `AnyOf`, or the media type of a text."""
    request: Any = None
    """Type of the body, or an `AnyOf`. None if there is none."""
    event: Any = None
    """Type of the data of an event, or an `AnyOf`. None if the endpoint does not stream."""
    query: Mapping[str, Any] = {}
    """Types of the query's parameters."""
    error: type[Struct] = ErrorBody


def variant(base: type[Struct], name: str = "", /, **types: Any) -> type[Struct]:
    """Returns a struct with the fields of `base`, some with other `types`."""
    fields = [
        (field.name, types.get(field.name, field.type), *([] if field.required else [UNSET]))
        for field in msgspec.structs.fields(base)
    ]
    names, about = dict(zip(base.__struct_fields__, base.__struct_encode_fields__, strict=True)), base.__doc__
    return msgspec.defstruct(name or base.__name__, fields, kw_only=True, rename=names, namespace={"__doc__": about})


OUTPUT_ITEMS = AnyOf(MessageItem, FunctionCallItem, CustomToolCallItem, ReasoningItem)
OUTPUT_PARTS = AnyOf(OutputTextPart, ReasoningTextPart, SummaryTextPart)
_VERBOSE: dict[str, Any] = {"verbose": LlamaCompletionReply | UnsetType}
_WHOLE = {**_VERBOSE, "usage": UsageReply | UnsetType}
_CHUNK = {**_VERBOSE, "usage": RunningUsage | UnsetType | None}  # without the details that the last chunk has
_CHAT = variant(CompletionReply, "ChatCompletion", choices=list[ChatChoice], **_WHOLE)
_CHAT_CHUNK = variant(CompletionReply, "ChatCompletionChunk", choices=list[ChatChunkChoice], **_CHUNK)
_TEXT = variant(CompletionReply, "TextCompletion", choices=list[TextChoice], **_WHOLE)
_TEXT_CHUNK = variant(CompletionReply, "TextCompletionChunk", choices=list[TextChoice], **_CHUNK)
_OUTPUT = Annotated[list[Any], Meta(extra_json_schema={"items": OUTPUT_ITEMS.schema})]
_RESPONSE = variant(ResponseReply, output=_OUTPUT, **_VERBOSE)
_EVENT = variant(ResponseEvent, response=_RESPONSE)
_OUTPUT_EVENT = variant(
    OutputEvent,
    item=Annotated[Any, Meta(extra_json_schema=OUTPUT_ITEMS.schema)],
    part=Annotated[Any, Meta(extra_json_schema=OUTPUT_PARTS.schema)],
)
_MESSAGE_EVENTS = AnyOf(
    MessageStart, ContentBlockStart, ContentBlockDelta, ContentBlockStop, MessageEnd, MessageStop, MessageErrorBody
)
_TOKENIZED = variant(LlamaTokenizeReply, tokens=list[int | TokenPiece])
_LLAMA = Operation(LlamaCompletionReply, LlamaCompletionRequest, AnyOf(LlamaCompletionChunk, LlamaCompletionReply))
_OBJECT = dict[str, Any]

# Structs to which other schemas refer only by name.
REFERENCED: tuple[Any, ...] = (*OUTPUT_ITEMS, *OUTPUT_PARTS, *_MESSAGE_EVENTS, TokenPiece)

OPERATIONS: dict[Callable[..., Any], Operation] = {
    ChatCompletionEndpoint.create: Operation(_CHAT, ChatRequest, _CHAT_CHUNK),
    TextCompletionEndpoint.create: Operation(_TEXT, TextRequest, _TEXT_CHUNK),
    RenderEndpoints.count_chat: Operation(InputTokensReply, ChatRequest),
    RenderEndpoints.chat: Operation(RenderedPrompt, ChatRequest),
    RenderEndpoints.text: Operation(list[RenderedPrompt], TextRequest),
    ResponsesEndpoints.create: Operation(_RESPONSE, ResponsesRequest, AnyOf(_EVENT, _OUTPUT_EVENT, ErrorBody)),
    ResponsesEndpoints.input_tokens: Operation(InputTokensReply, ResponsesRequest),
    ResponsesEndpoints.retrieve: Operation(_RESPONSE),
    ResponsesEndpoints.delete: Operation(DeletedResponse),
    ResponsesEndpoints.input_items: Operation(InputItemList, query={"limit": int, "order": str, "after": str}),
    MessagesEndpoints.create: Operation(MessageReply, MessagesRequest, _MESSAGE_EVENTS, error=MessageErrorBody),
    MessagesEndpoints.count_tokens: Operation(TokenCountReply, MessagesRequest, error=MessageErrorBody),
    CompletionEndpoint.complete: _LLAMA,
    InfillEndpoint.fill: msgspec.structs.replace(_LLAMA, request=InfillRequest),
    TokenizeEndpoints.tokenize: Operation(
        AnyOf(_TOKENIZED, TokenizeReply), AnyOf(LlamaTokenizeRequest, TokenizeCompletionRequest, TokenizeChatRequest)
    ),
    TokenizeEndpoints.detokenize: Operation(DetokenizeReply, DetokenizeRequest),
    TokenizeEndpoints.apply_template: Operation(ApplyTemplateReply, ChatRequest),
    SlotEndpoints.show: Operation(list[SlotReply], query={"fail_on_no_slot": str}),
    SlotEndpoints.act: Operation(
        AnyOf(SlotSavedReply, SlotRestoredReply, SlotErasedReply), SlotFileRequest, query={"action": str}
    ),
    LoraEndpoints.show: Operation(list[LoraAdapterReply]),
    LoraEndpoints.set_scales: Operation(LoraScalesReply, list[LoraScale]),
    EmbeddingEndpoints.create: Operation(AnyOf(EmbeddingReply, list[LlamaEmbeddingItem]), EmbeddingRequest),
    EmbeddingEndpoints.native: Operation(list[LlamaEmbeddingItem], EmbeddingRequest),
    RerankEndpoint.rank: Operation(AnyOf(RerankReply, list[TeiResult]), RerankRequest),
    StatusEndpoints.models: Operation(ModelList),
    StatusEndpoints.model: Operation(ModelReply),
    StatusEndpoints.health: Operation(HealthReply),
    StatusEndpoints.version: Operation(_OBJECT),
    StatusEndpoints.metrics: Operation("text/plain"),
    StatusEndpoints.props: Operation(Props),
    StatusEndpoints.set_props: Operation(_OBJECT),
    ProbeEndpoints.live: Operation(HealthReply),
    ProbeEndpoints.is_sleeping: Operation(_OBJECT),
    ProbeEndpoints.server_info: Operation(_OBJECT),
    ProbeEndpoints.model_info: Operation(_OBJECT),
    PredictEndpoint.predict: Operation(Predictions, PredictRequest),
    LiveEventsEndpoint.stream: Operation("text/event-stream", event=LiveSnapshot),
}
