"""Request and replies of POST /completion in llama-server's shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from api.http.decode_errors import choices_hint
from api.llama_server.generation_settings import SAMPLERS
from api.schema.replies import TimingsReply
from api.schema.requests import ChoiceCount, GenerationRequest, Int32, NonNegativeInt
from engine import PrefillProgress, RequestRefused, SamplingParams

# A prompt as a mixed list of texts and tokens.
MixedPrompt = list[str | int]


class LlamaCompletionRequest(GenerationRequest, kw_only=True):
    """Request body of POST /completion."""

    prompt: str | list[str | int | MixedPrompt]
    n_cmpl: ChoiceCount | None = None
    n_probs: Annotated[int, Meta(ge=0, le=100)] | None = None
    id_slot: Int32 | None = None
    """Valid slots and -1 are accepted without effect, since all slots share the prefix cache."""
    cache_prompt: bool | None = None
    return_tokens: bool | None = None
    response_fields: Annotated[list[str], Meta(max_length=64)] | None = None
    samplers: str | list[str] | None = None
    t_max_predict_ms: Int32 | None = None
    timings_per_token: bool | None = None
    return_progress: bool | None = None

    grammar_lazy: bool | None = None
    n_keep: Int32 | None = None
    n_discard: NonNegativeInt | None = None
    n_indent: NonNegativeInt | None = None
    min_keep: NonNegativeInt | None = None
    mirostat: Int32 | None = None
    dynatemp_range: float | None = None
    top_n_sigma: float | None = None
    adaptive_target: float | None = None
    post_sampling_probs: bool | None = None
    backend_sampling: bool | None = None
    lora: list[Any] | None = None

    def __post_init__(self) -> None:
        self.n = self.n_cmpl if self.n is None else self.n

    @property
    def prompts(self) -> Sequence[str | MixedPrompt]:
        """The prompts. A list that contains token ids is one prompt, any other list is a list of prompts.

        Raises RequestRefused for an empty list and for a list that mixes tokens and lists.
        """
        if isinstance(self.prompt, str):
            return [self.prompt]
        kinds = set(map(type, self.prompt))
        has_token_ids = int in kinds
        if not kinds or (has_token_ids and list in kinds):
            raise RequestRefused(
                "prompt must be a text, a list of texts and token ids, or a non-empty list of such prompts.",
                field="prompt",
            )
        if not has_token_ids:
            return [item for item in self.prompt if not isinstance(item, int)]
        return [[item for item in self.prompt if not isinstance(item, list)]]

    def sampling_params(self, defaults: SamplingParams) -> SamplingParams:
        """Returns the sampling parameters, with neutral values for the stages that `samplers` omits."""
        neutral: dict[str, float | int] = {}
        for stage, values in _NEUTRAL_VALUES.items():
            if stage not in self.sampler_stages:
                neutral |= values
        return msgspec.structs.replace(super().sampling_params(defaults), **neutral)

    @property
    def sampler_stages(self) -> Sequence[str]:
        """The active sampler stages. Raises RequestRefused for unknown stages and another order than `SAMPLERS`."""
        return SAMPLERS if self.samplers is None else _parse_samplers(self.samplers)

    def refuse_unsupported(self) -> None:
        """Raises RequestRefused if an unsupported field has a value other than off."""
        for name, (is_off, off) in _UNSUPPORTED.items():
            value = getattr(self, name)
            if value is not None and not is_off(value):
                raise RequestRefused(f"{name} is not supported, only {off}.", field=name)


# For each unsupported field: a test that is true for values that mean off, and a description of those values.
_UNSUPPORTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "grammar_lazy": (lambda value: not value, "false: a grammar applies from the first token"),
    "n_indent": (lambda value: not value, "0"),
    "min_keep": (lambda value: value <= 1, "0 or 1: one token is always kept"),
    "mirostat": (lambda value: value == 0, "0"),
    "dynatemp_range": (lambda value: value == 0, "0"),
    "top_n_sigma": (lambda value: value <= 0, "0 or less"),
    "adaptive_target": (lambda value: value < 0, "less than 0"),
    "post_sampling_probs": (lambda value: not value, "false: n_probs are computed before sampling"),
    "lora": (lambda value: not value, "an empty list"),
}

# For each stage, the parameters with which it has no effect.
_NEUTRAL_VALUES: dict[str, dict[str, float | int]] = {
    "penalties": {"repeat_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0},
    "dry": {"dry_multiplier": 0.0},
    "top_k": {"top_k": 0},
    "typ_p": {"typical_p": 1.0},
    "top_p": {"top_p": 1.0},
    "min_p": {"min_p": 0.0},
    "xtc": {"xtc_probability": 0.0},
    "temperature": {"temperature": 1.0},
}

_SAMPLER_LETTERS = dict(zip("edskypmxt", SAMPLERS, strict=True))
_SAMPLER_ALIASES = {"typical_p": "typ_p", "top-k": "top_k", "top-p": "top_p", "min-p": "min_p", "temp": "temperature"}


def _parse_samplers(samplers: str | list[str]) -> list[str]:
    """Returns the stages of `samplers`: names, or letters in one string. Raises RequestRefused."""
    known = _SAMPLER_LETTERS if isinstance(samplers, str) else dict.fromkeys(SAMPLERS)
    for name in samplers:
        if name not in known and name not in _SAMPLER_ALIASES:
            raise RequestRefused(
                f"samplers contains an unknown stage {name[:32]!r}{choices_hint(name, known)}", field="samplers"
            )
    names = _SAMPLER_LETTERS if isinstance(samplers, str) else _SAMPLER_ALIASES
    stages = [names.get(name, name) for name in samplers]
    positions = [SAMPLERS.index(stage) for stage in stages]
    if positions != sorted(set(positions)):
        raise RequestRefused(
            f"samplers may omit stages but must keep this order: {', '.join(SAMPLERS)}.", field="samplers"
        )
    return stages


class TopProb(Struct, frozen=True):
    """A candidate token and its log probability."""

    id: int
    token: str
    bytes: list[int]
    logprob: float


class TokenProb(Struct, frozen=True):
    """An emitted token, and the most probable tokens at its position."""

    id: int
    token: str
    bytes: list[int]
    logprob: float
    top_logprobs: list[TopProb]


class RunningTimings(Struct, frozen=True):
    """The fields of `timings` that are known before the choice has finished."""

    predicted_n: int
    predicted_ms: float
    predicted_per_token_ms: float
    predicted_per_second: float


class PromptProgress(Struct, frozen=True):
    """Prefill progress in tokens; `processed` includes tokens from the cache."""

    total: int
    cache: int
    processed: int
    time_ms: int

    @classmethod
    def of(cls, progress: PrefillProgress) -> PromptProgress:
        """Returns the engine's prefill progress in llama-server's shape."""
        return cls(progress.prompt, progress.cached, progress.processed, round(progress.seconds * 1e3))


class LlamaCompletionChunk(Struct, frozen=True, kw_only=True):
    """An event of a stream before its choice has finished."""

    index: int
    content: str
    tokens: Sequence[int]
    stop: bool = False
    id_slot: int = -1
    tokens_predicted: int
    """Tokens emitted so far."""
    tokens_evaluated: int
    """Tokens of the prompt."""
    timings: RunningTimings | UnsetType = UNSET
    prompt_progress: PromptProgress | UnsetType = UNSET
    completion_probabilities: Sequence[TokenProb] | UnsetType = UNSET


class LlamaCompletionReply(Struct, frozen=True, kw_only=True):
    """A finished choice: the last event of a stream, with empty `content`, or a response body."""

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
    """True if the context became full, so that a context shift discarded tokens or the completion ended."""
    stop_type: str
    stopping_word: str
    tokens_cached: int
    """Tokens that remain in the prefix cache."""
    timings: TimingsReply
    completion_probabilities: Sequence[TokenProb] | UnsetType = UNSET

    def selected(self, fields: Sequence[str]) -> dict[str, Any]:
        """Returns the values at `fields`, each a path with slashes between nested names. Unknown paths are omitted."""
        whole = msgspec.to_builtins(self)
        selection = {}
        for path in fields:
            value: Any = whole
            for key in path.split("/"):
                value = value.get(key, UNSET) if isinstance(value, dict) else UNSET
            if value is not UNSET:
                selection[path] = value
        return selection
