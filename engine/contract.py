"""The values between a caller and the engine thread: requests in, updates out, and errors.

    EngineError
    ├── RequestRefused        invalid request: 400
    │   ├── ContextExceeded   the prompt is longer than the context of a request
    │   └── GrammarTimeout    the grammar takes too long to compile
    ├── Overloaded            the queue is full: 429 with Retry-After
    ├── Draining              the engine is shutting down and refuses new requests: 503
    ├── ModelError            the model cannot be opened; there is no engine
    └── EngineFault           internal failure: 500; the engine continues unless `fatal`

Every request gets any number of `Tokens` and then exactly one terminal update: `Finished` or `Failed`.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, Any, Literal, get_args

from msgspec import Meta, Struct

from engine.adapters import AdapterSet, namespace
from engine.grammar import Grammar
from engine.media import MediaRun
from engine.sampling_params import SamplingParams as SamplingParams
from engine.sampling_params import Share as Share
from engine.text import StopScope


class EngineError(Exception):
    """Base of all errors that the engine reports to a caller. Picklable, whatever a subclass's constructor takes."""

    def __reduce__(self) -> tuple[Any, ...]:
        return EngineError.__new__, (type(self), *self.args), self.__dict__


class RequestRefused(EngineError):
    """The request can never run. `field` names its invalid field. None if no single field is invalid."""

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class GrammarTimeout(RequestRefused):
    """The grammar was not compiled in time, perhaps because other grammars were compiled before it."""


class ContextExceeded(RequestRefused):
    """A prompt of `prompt_tokens` tokens does not fit, with one new token, into a context of `limit` tokens."""

    def __init__(self, prompt_tokens: int, limit: int, slots: int = 0, *, at_least: bool = False) -> None:
        """`slots` is the number of slots that share the context evenly; 0 if one request may use all of it. `at_least`
        is True if the prompt was refused by its length in bytes, from which `prompt_tokens` follows as a minimum."""
        count = f"at least {prompt_tokens}" if at_least else prompt_tokens
        share = f" (each of {slots} slots has its own part of --ctx-size)" if slots else ""
        remedy = "a larger --ctx-size, fewer --parallel slots or --kv-unified" if slots else "a larger --ctx-size"
        super().__init__(
            f"This model's maximum context length is {limit} tokens{share}, but the prompt has {count}. "
            # Clients match the beginning, which is OpenAI's, or these words, which are llama-server's.
            f"The request exceeds the available context size. Shorten the prompt or serve with {remedy}.",
            field="prompt",
        )
        self.prompt_tokens = prompt_tokens
        self.limit = limit


class Overloaded(EngineError):
    """The queue is full. `retry_after` estimates the seconds until another request can be queued."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"All slots are busy and the queue is full. Retry in {retry_after:.0f} s.")
        self.retry_after = retry_after


class Draining(EngineError):
    """The engine is shutting down."""

    def __init__(self) -> None:
        super().__init__("The server is shutting down and refuses new requests.")


class ModelError(EngineError):
    """The model cannot be opened. The message gives the reason in one line."""


class EngineFault(EngineError):
    """An internal failure. After a `fatal` one the engine refuses all requests."""

    def __init__(self, message: str, *, fatal: bool = False) -> None:
        super().__init__(message)
        self.fatal = fatal


# Clients get these sentences. The exceptions and their tracebacks are for the operator, so only the log has them.
REQUEST_FAILED = "The request has failed; the server's log has the reason."
ENGINE_FAILED = "The engine has failed; its log has the reason."


class ShutDown(EngineFault):
    """The engine was closed before the request ended."""

    def __init__(self) -> None:
        super().__init__("The server is shutting down.")


ProposerType = Literal[
    "prediction",
    "grammar",
    "ngram-simple",
    "ngram-map-k",
    "ngram-map-k4v",
    "ngram-mod",
    "ngram-cache",
    "suffix",
    "draft",
    "draft-mtp",
]
# The order of `ProposerType` is that in which proposers are polled with `order = "fixed"` (`--spec-order fixed`).
PROPOSER_TYPES: tuple[ProposerType, ...] = get_args(ProposerType)
DraftLength = Annotated[int, Meta(ge=0, le=1024)]

# Origins of tokens that are not drafted: the only permitted token of a row, and a token sampled among several.
FORCED_TOKEN, MODEL_TOKEN = "forced", "model"


class Speculation(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Speculative decoding of one request. `None` means the server's default."""

    type: tuple[ProposerType | Literal["auto"], ...] = ()
    """Types of proposers; `auto` means all that are available. Empty turns speculation off."""
    n_max: Annotated[int, Meta(ge=1, le=1024)] | None = None
    """Maximum tokens of a draft."""
    n_min: DraftLength | None = None
    """Minimum tokens of a draft; shorter ones are not verified."""
    p_min: Share | None = None
    """A draft ends before a token whose estimated probability is below this."""
    size_n: Annotated[int, Meta(ge=1, le=1024)] | None = None
    """Length in tokens of the n-gram that `ngram-simple` and the `ngram-map` types look up."""
    min_hits: Annotated[int, Meta(ge=1, le=1024)] | None = None
    """Minimum number of earlier occurrences of that n-gram."""
    order: Literal["measured", "fixed"] | None = None
    """`measured` chooses types and lengths by measured costs and acceptance; `fixed` verifies the whole draft of the
    first proposer that has one."""


class ReasoningBudget(Struct, frozen=True):
    """A bound on the reasoning before the answer: after `tokens` tokens of reasoning, `closing` is emitted."""

    tokens: int
    opens: str
    """Text that begins the reasoning; empty if the prompt ends with it."""
    closes: str
    """Text that ends the reasoning."""
    closing: tuple[int, ...]
    """Tokens of the closing text, emitted in place of sampled ones."""


class Request(Struct, frozen=True, kw_only=True):
    """One continuation of one prompt."""

    prompt: tuple[int, ...]
    """Token ids, special ones included; at least one. The pseudo-tokens of `media` are negative. The last token
    is one of text."""
    media: tuple[MediaRun, ...] = ()
    """The runs of pseudo-tokens of images and sounds, in the order of the prompt, from `MediaReader.read`."""
    max_tokens: int | None = None
    """Maximum number of new tokens; 0 only prefills the prompt. None means up to the end of the context, or as many
    tokens as the context has with context shifts."""
    min_tokens: int = 0
    """Neither an end token nor a stop token is sampled before this many tokens, unless the grammar permits no other. A
    stop string that these tokens complete does not end the continuation."""
    sampling: SamplingParams = SamplingParams()
    stop: tuple[str, ...] = ()
    """Strings that end the continuation. The string that is complete first ends it and is not part of the text."""
    stop_scope: Callable[[], StopScope] | None = None
    """Returns a new scope of the stop strings. None means that they apply to the whole text."""
    stop_tokens: tuple[int, ...] = ()
    """Tokens that end the continuation besides the model's end tokens; not part of the text."""
    ignore_eos: bool = False
    """If True, the model's end tokens are never sampled, unless the grammar permits no other."""
    logprobs: int | None = None
    """Number of alternatives reported for each token. None reports no logprobs at all."""
    post_sampling: bool = False
    """If True, logprobs are those of the distribution after all sampling stages, else those of the raw logits."""
    grammar: Grammar | None = None
    """Grammar of the continuation, from `Engine.compile`. An end token is sampled only where the grammar may end. Where
    the grammar must end, the continuation ends without an end token."""
    salt: str = ""
    """Cached prefixes and the shared data of proposers are shared between requests of equal salt and adapters only."""
    adapters: AdapterSet | None = None
    """The LoRA adapters of the request. None means the engine's default set."""
    cache: bool = True
    """If False, no cached prefix is used, and nothing of the request stays in cells or tiers after its end."""
    keep: int | None = None
    """Tokens of the prompt that a context shift keeps; -1 keeps the whole prompt. None means the engine's default."""
    speculation: Speculation | None = None
    """None means the engine's default."""
    prediction: tuple[int, ...] = ()
    """Token ids of the expected continuation. The `prediction` proposer drafts from them unless `speculation` turns
    speculation off."""
    control_texts: tuple[tuple[int, str], ...] = ()
    """Control tokens with the text that each has in the output. All other control tokens have no text."""
    reasoning: ReasoningBudget | None = None
    """None means no bound on the reasoning."""
    slot: int | None = None
    """The slot in which the request runs if it is free when the request starts. None means any slot."""
    owner: str = ""
    """The client, key or user among which slots and prefill are divided fairly."""
    weight: Annotated[float, Meta(gt=0.0)] = 1.0
    """The owner's share, relative to those of other owners."""
    priority: int = 0
    """Requests with a lower value start first, and those with a higher one yield to them."""
    timeout: float | None = None
    """Seconds from submission to the end of the request. None means no limit."""
    progress: bool = False
    """If True, every step of the prefill is reported as a `PrefillProgress`."""
    origins: bool = False
    """If True, the origin of each token is reported, see `Tokens.origins`."""
    id: str = ""
    """The caller's identifier, for logs."""

    @property
    def namespace(self) -> str:
        """The namespace of prefixes and drafts: equal for equal salts and adapters only."""
        return namespace(self.salt, self.adapters or ())


class FinishReason(StrEnum):
    """The reason for the end of a request."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


class Logprob(Struct, frozen=True):
    """Log probabilities of an emitted token and of the most likely tokens of its row, see `Request.post_sampling`."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class PrefillProgress(Struct, frozen=True):
    """Progress of a prefill. Counts are in tokens of the prompt."""

    prompt: int
    cached: int
    """Tokens whose KV was loaded or shared instead of computed."""
    processed: int
    """Tokens in cells so far, including `cached`."""
    seconds: float
    """Seconds since the request started to run."""


class Tokens(Struct, frozen=True):
    """New tokens in order, and the text that they complete.

    Text is held back while it may become part of a stop string or ends with an incomplete character.
    """

    ids: tuple[int, ...]
    text: str
    logprobs: tuple[Logprob, ...] = ()
    origins: tuple[str, ...] = ()
    """For each token, if the request asks: the type of the proposer that drafted it, `FORCED_TOKEN` or
    `MODEL_TOKEN`."""
    prefill_progress: PrefillProgress | None = None
    """Set in updates during the prefill, which have no tokens."""


class Usage(Struct, frozen=True):
    """Token counts of one request."""

    prompt: int
    cached: int
    """Prompt tokens whose KV was loaded or shared instead of computed."""
    completion: int
    """Emitted tokens, the end token included."""
    drafted: int = 0
    accepted: int = 0
    moved: int = 0
    """Cached tokens whose KV was computed at other positions or after other tokens, and so is an approximation."""


class DraftStats(Struct, frozen=True):
    """Statistics of the drafts of one proposer type."""

    type: str
    drafted: int
    """Draft tokens verified."""
    by_accepted: tuple[int, ...]
    """Item n: number of drafts with n accepted tokens."""
    expected: float = 0.0
    """Accepted tokens expected by the acceptance estimates."""
    saved: float = 0.0
    """Estimated seconds of steps that the accepted tokens would have taken without drafts."""
    spent: float = 0.0
    """Seconds taken by proposing and verifying all drafts."""
    chance: float = 0.0
    """Current estimate of the chance, 0 to 1, that the first token of a draft is accepted."""
    failures: int = 0
    """Requests for which a proposer was switched off after an exception."""

    @property
    def accepted(self) -> int:
        """Draft tokens accepted."""
        return sum(tokens * drafts for tokens, drafts in enumerate(self.by_accepted))


class Timings(Struct, frozen=True):
    """Durations of a request, in seconds."""

    queue: float
    """From submission to the start."""
    prompt: float
    """From the start to the first token."""
    predicted: float
    """From the first token to the end."""


class Finished(Struct, frozen=True):
    """The terminal update of a request that ended by itself or was cancelled."""

    reason: FinishReason
    usage: Usage
    timings: Timings
    seed: int
    stop: str | int | None = None
    """The stop string or token that ended the request, if one did."""
    drafts: tuple[DraftStats, ...] = ()
    """One for each type of the request's proposers."""
    discarded: int = 0
    """Tokens discarded by context shifts."""
    slot: int = -1
    """Number of the slot in which the request ran; -1 if it did not start."""


class Failed(Struct, frozen=True):
    """The terminal update of a request that failed."""

    error: EngineError


# The updates that a `Generation` yields; it raises the error of a `Failed`.
Update = Tokens | Finished
