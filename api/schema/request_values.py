"""Values of the fields of requests: numbers with their ranges, and objects."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from engine import RequestRefused

# Every JSON parser reads integers up to 2^53 exactly.
NonNegativeInt = Annotated[int, Meta(ge=0, le=2**53)]
# A maximum number of tokens; -1 is unlimited.
TokenLimit = Annotated[int, Meta(ge=-1, le=2**53)]
ChoiceCount = Annotated[int, Meta(ge=1, le=128)]
TopLogprobCount = Annotated[int, Meta(ge=0, le=20)]
ProbabilityCount = Annotated[int, Meta(ge=0, le=100)]
# Tokens of the prompt that a context shift keeps; -1 keeps the whole prompt.
ContextKeep = Annotated[int, Meta(ge=-1, le=2**31 - 1)]
Int32 = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
SignedSeed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Milliseconds = Annotated[int, Meta(ge=1, le=86_400_000)]
StopString = Annotated[str, Meta(max_length=512)]
StopStrings = Annotated[list[StopString], Meta(max_length=64)]


class LoraScale(Struct):
    """llama-server's choice of one LoRA adapter. Adapters that a list leaves out are not applied."""

    id: NonNegativeInt
    scale: float = 0.0


class StreamOptions(Struct):
    """OpenAI's `stream_options`, with vLLM's `continuous_usage_stats`."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class NamedSchema(Struct):
    """A JSON schema in OpenAI's shape. With `strict`, a keyword that no grammar can follow is an error."""

    schema: dict[str, Any]
    name: str | None = None
    strict: bool | None = None


class ResponseFormat(Struct):
    """OpenAI's constraint on the output. `schema` is llama-server's extension of type `json_object`."""

    type: str
    json_schema: NamedSchema | None = None
    schema: dict[str, Any] | None = None


class StructuredOutputs(Struct, forbid_unknown_fields=True):
    """vLLM's constraint on the output. At most one field may be set."""

    json: dict[str, Any] | str | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class ImageURL(Struct):
    """The URL of an image. `detail` has no effect, as the projector chooses the size."""

    url: str
    detail: str | None = None


class InputAudio(Struct):
    """A sound, in base64 or by URL. `format` has no effect, as the content shows it."""

    data: str | None = None
    url: str | None = None
    format: str | None = None


class ContentPart(Struct):
    """One part of a message's content, with the fields of all types."""

    type: str
    text: str | None = None
    image_url: str | ImageURL | None = None
    input_audio: InputAudio | None = None


class PromptObject(Struct):
    """llama-server's prompt as an object: a text, with markers in place of files in base64."""

    prompt_string: str
    multimodal_data: list[str] | None = None


class PredictedOutput(Struct):
    """OpenAI's `prediction`: a text of which the output probably repeats large parts."""

    type: Literal["content"]
    content: str | list[ContentPart]


def prompt_text(prompt: str | PromptObject) -> str:
    """Returns the text of a prompt. Raises RequestRefused if the prompt has images or sounds."""
    if isinstance(prompt, str):
        return prompt
    if prompt.multimodal_data:
        raise RequestRefused(
            "prompt: multimodal_data is not supported here; send it to /completion, or images in the messages of a "
            "chat.",
            field="prompt",
        )
    return prompt.prompt_string


class SchedulingFields(Struct, kw_only=True):
    """The fields that decide when a request runs, in the order of the queue and for how long."""

    user: str | None = None
    """The owner of the request for fair queueing on a server without API keys."""
    priority: Int32 | None = None
    """vLLM's: requests with a lower value are first."""
    timeout_ms: Milliseconds | None = None
    """Milliseconds from the start of the wait in the queue to the end of the output."""
