"""What clients send to llama-server's own POST /completion, and what they get."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from api.http.decode_errors import nearest
from api.llama_server.generation_settings import SAMPLERS
from api.schema.replies import TimingsReply
from api.schema.requests import Choices, Completion, Count, Int
from engine import Reading, RequestRefused, SamplingParams

Pieces = list[str | int]
"""A prompt of texts and tokens by turns."""


class NativeRequest(Completion, kw_only=True):
    """POST /completion."""

    prompt: str | list[str | int | Pieces]
    n_cmpl: Choices | None = None
    n_probs: Annotated[int, Meta(ge=0, le=100)] | None = None
    id_slot: Int | None = None
    """No slot has prefixes of its own here, so any will do: one that there is, or -1, is taken and changes nothing."""
    cache_prompt: bool | None = None
    return_tokens: bool | None = None
    response_fields: Annotated[list[str], Meta(max_length=64)] | None = None
    samplers: str | list[str] | None = None
    t_max_predict_ms: Int | None = None
    timings_per_token: bool | None = None
    return_progress: bool | None = None

    grammar_lazy: bool | None = None
    n_keep: Int | None = None
    n_discard: Count | None = None
    n_indent: Count | None = None
    min_keep: Count | None = None
    mirostat: Int | None = None
    dynatemp_range: float | None = None
    top_n_sigma: float | None = None
    adaptive_target: float | None = None
    post_sampling_probs: bool | None = None
    backend_sampling: bool | None = None
    lora: list[Any] | None = None

    def __post_init__(self) -> None:
        self.n = self.n_cmpl if self.n is None else self.n

    @property
    def prompts(self) -> Sequence[str | Pieces]:
        """The prompts. A list with a token in it is one prompt, another is one of prompts. Raises RequestRefused."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        kinds = set(map(type, self.prompt))
        numbers = int in kinds
        if not kinds or (numbers and list in kinds):
            raise RequestRefused(
                "prompt must be a text, a list of texts and token ids, or a list of such prompts, and not empty.",
                field="prompt",
            )
        if not numbers:
            return [item for item in self.prompt if not isinstance(item, int)]
        return [[item for item in self.prompt if not isinstance(item, list)]]

    def sampling(self, defaults: SamplingParams) -> SamplingParams:
        """The same as for every completion, without the stages that `samplers` leaves out."""
        stages = self.stages
        without = {name: value for stage, off in _OFF.items() if stage not in stages for name, value in off.items()}
        return msgspec.structs.replace(super().sampling(defaults), **without)

    @property
    def stages(self) -> Sequence[str]:
        """The stages that tokens are picked by. Raises RequestRefused for what is none, and for another order."""
        return SAMPLERS if self.samplers is None else _stages(self.samplers)

    def refuse_unsupported(self) -> None:
        """Raises RequestRefused for a wish that would silently not be met."""
        for name, (is_off, off) in _UNSUPPORTED.items():
            value = getattr(self, name)
            if value is not None and not is_off(value):
                raise RequestRefused(f"{name} is not supported, only {off}.", field=name)


_UNSUPPORTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "grammar_lazy": (lambda value: not value, "false: a grammar holds from the first token"),
    "n_indent": (lambda value: not value, "0"),
    "min_keep": (lambda value: value <= 1, "0 or 1: one token is always kept"),
    "mirostat": (lambda value: value == 0, "0"),
    "dynatemp_range": (lambda value: value == 0, "0"),
    "top_n_sigma": (lambda value: value <= 0, "0 or less"),
    "adaptive_target": (lambda value: value < 0, "less than 0"),
    "post_sampling_probs": (lambda value: not value, "false: n_probs are those of the model"),
    "lora": (lambda value: not value, "an empty list"),
}
"""Fields that have to be off, whether they are, and how that is said."""

_OFF: dict[str, dict[str, float | int]] = {
    "penalties": {"repeat_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0},
    "dry": {"dry_multiplier": 0.0},
    "top_k": {"top_k": 0},
    "typ_p": {"typical_p": 1.0},
    "top_p": {"top_p": 1.0},
    "min_p": {"min_p": 0.0},
    "xtc": {"xtc_probability": 0.0},
    "temperature": {"temperature": 1.0},
}
"""What stands for the absence of a stage."""

_LETTERS = dict(zip("edskypmxt", SAMPLERS, strict=True))
_RENAMED = {"typical_p": "typ_p", "top-k": "top_k", "top-p": "top_p", "min-p": "min_p", "temp": "temperature"}


def _stages(samplers: str | list[str]) -> list[str]:
    """The stages by name. Raises RequestRefused."""
    known = _LETTERS if isinstance(samplers, str) else dict.fromkeys(SAMPLERS)
    for name in samplers:
        if name not in known and name not in _RENAMED:
            raise RequestRefused(f"samplers: there is no {name[:32]!r}{nearest(name, known)}", field="samplers")
    stages = [_LETTERS[name] if isinstance(samplers, str) else _RENAMED.get(name, name) for name in samplers]
    if [SAMPLERS.index(stage) for stage in stages] != sorted({SAMPLERS.index(stage) for stage in stages}):
        order = ", ".join(SAMPLERS)
        raise RequestRefused(f"samplers may leave stages out, but run in this order: {order}.", field="samplers")
    return stages


class TopProb(Struct, frozen=True):
    """A likely token."""

    id: int
    token: str
    bytes: list[int]
    logprob: float


class TokenProb(Struct, frozen=True):
    """A token of the text, and those likeliest in its place."""

    id: int
    token: str
    bytes: list[int]
    logprob: float
    top_logprobs: list[TopProb]


class Progress(Struct, frozen=True):
    """The part of `timings` that is known while a choice runs."""

    predicted_n: int
    predicted_ms: float
    predicted_per_token_ms: float
    predicted_per_second: float


class PromptProgress(Struct, frozen=True):
    """How far the prompt is read, in tokens; those from the cache count as processed."""

    total: int
    cache: int
    processed: int
    time_ms: int

    @classmethod
    def of(cls, reading: Reading) -> PromptProgress:
        """As the engine tells it."""
        return cls(reading.prompt, reading.cached, reading.processed, round(reading.seconds * 1e3))


class NativeChunk(Struct, frozen=True, kw_only=True):
    """An event of a stream, all but the last of each choice."""

    index: int
    content: str
    tokens: Sequence[int]
    stop: bool = False
    id_slot: int = -1
    tokens_predicted: int
    """So far."""
    tokens_evaluated: int
    """Of the prompt."""
    timings: Progress | UnsetType = UNSET
    prompt_progress: PromptProgress | UnsetType = UNSET
    completion_probabilities: Sequence[TokenProb] | UnsetType = UNSET


class NativeReply(Struct, frozen=True, kw_only=True):
    """A choice at its end: the last event of a stream, with nothing in `content`, or a body."""

    index: int
    content: str
    tokens: Sequence[int]
    id_slot: int = -1
    stop: bool = True
    model: str
    tokens_predicted: int
    tokens_evaluated: int
    generation_settings: dict[str, object]
    prompt: str
    has_new_line: bool
    truncated: bool
    """Whether the context was full: a part was forgotten, or it is the end."""
    stop_type: str
    stopping_word: str
    tokens_cached: int
    """Tokens that are kept, for the next request that begins so."""
    timings: TimingsReply
    completion_probabilities: Sequence[TokenProb] | UnsetType = UNSET

    def only(self, fields: Sequence[str]) -> dict[str, Any]:
        """These fields alone, each under its path with slashes; what there is not is left out."""
        whole = msgspec.to_builtins(self)
        found = {}
        for path in fields:
            at: Any = whole
            for key in path.split("/"):
                at = at.get(key, UNSET) if isinstance(at, dict) else UNSET
            if at is not UNSET:
                found[path] = at
        return found
