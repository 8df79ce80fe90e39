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
from typing import Annotated, Literal, get_args

from msgspec import Meta, Struct

from engine.grammar import Grammar
from engine.text import StopScope


class EngineError(Exception):
    """Base of all errors that the engine reports to a caller."""


class RequestRefused(EngineError):
    """The request can never run. `field` names its invalid field. None if no single field is invalid."""

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class GrammarTimeout(RequestRefused):
    """The grammar was not compiled in time, perhaps because other grammars were compiled before it."""


class ContextExceeded(RequestRefused):
    """A prompt of `prompt_tokens` tokens does not fit, with one new token, into a context of `limit` tokens."""

    def __init__(self, prompt_tokens: int, limit: int, slots: int = 0) -> None:
        """`slots` is the number of slots that share the context evenly; 0 if one request may use all of it."""
        share = f" (each of {slots} slots has its own part of --ctx-size)" if slots else ""
        remedy = "a larger --ctx-size, fewer --parallel slots or --kv-unified" if slots else "a larger --ctx-size"
        super().__init__(
            f"This model's maximum context length is {limit} tokens{share}, but the prompt has {prompt_tokens}. "
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


Share = Annotated[float, Meta(ge=0.0, le=1.0)]
# The number of latest tokens that a penalty considers; -1 means all tokens, 0 none.
TokenWindow = Annotated[int, Meta(ge=-1)]


class SamplingParams(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Parameters of sampling, with the names and defaults of llama-server.

    The stages run in this order: logit_bias, penalties, DRY, top_k, typical_p, top_p, min_p, XTC, temperature. The
    three penalties and DRY look back on the prompt and the output, as llama-server's do. `msgspec.convert` checks the
    ranges; the constructor does not.
    """

    temperature: Annotated[float, Meta(ge=0.0, le=100.0, description="0 picks the most likely token")] = 0.8
    top_k: Annotated[int, Meta(ge=-1, description="keep the k most likely tokens; 0 or -1 keeps all")] = 40
    top_p: Annotated[Share, Meta(description="keep the most likely tokens that together have this probability")] = 0.95
    min_p: Annotated[Share, Meta(description="drop tokens below this part of the highest probability")] = 0.05
    typical_p: Annotated[Share, Meta(description="locally typical sampling; 1 is off")] = 1.0
    repeat_penalty: Annotated[
        float, Meta(gt=0.0, le=100.0, description="lowers logits of tokens that occurred; 1 is off")
    ] = 1.0
    repeat_last_n: Annotated[
        TokenWindow,
        Meta(description="latest tokens that the three penalties look at; -1 is all"),
    ] = 64
    presence_penalty: Annotated[
        float, Meta(ge=-100.0, le=100.0, description="subtracted from the logit of a token that occurred; 0 is off")
    ] = 0.0
    frequency_penalty: Annotated[
        float,
        Meta(ge=-100.0, le=100.0, description="subtracted from its logit for each occurrence; 0 is off"),
    ] = 0.0
    dry_multiplier: Annotated[float, Meta(ge=0.0, le=100.0, description="DRY repetition penalty; 0 is off")] = 0.0
    dry_base: Annotated[float, Meta(ge=1.0, le=100.0, description="growth per repeated token")] = 1.75
    dry_allowed_length: Annotated[int, Meta(ge=0, description="repeats up to this many tokens have no DRY penalty")] = 2
    dry_penalty_last_n: Annotated[TokenWindow, Meta(description="latest tokens that DRY looks at; -1 is all")] = 64
    dry_sequence_breakers: Annotated[tuple[str, ...], Meta(description="strings that end a repeat for DRY")] = (
        "\n",
        ":",
        '"',
        "*",
    )
    xtc_probability: Annotated[Share, Meta(description="chance that XTC is applied to a token; 0 is off")] = 0.0
    xtc_threshold: Annotated[Share, Meta(description="XTC drops all but the least likely token above this")] = 0.1
    logit_bias: Annotated[
        tuple[tuple[int, float], ...], Meta(description="tokens and the numbers added to their logits")
    ] = ()
    seed: Annotated[
        Annotated[int, Meta(ge=0, le=2**63 - 1)] | None,
        Meta(description="default seed of requests; without it each request has a random one"),
    ] = None


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
]
# The order of `ProposerType` is that in which proposers are polled with `order = "fixed"` (`--spec-order fixed`).
PROPOSER_TYPES: tuple[ProposerType, ...] = get_args(ProposerType)
DraftLength = Annotated[int, Meta(ge=0, le=1024)]


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
    """Token ids, special ones included; at least one."""
    max_tokens: int | None = None
    """Maximum number of new tokens; 0 only prefills the prompt. None means up to the end of the context."""
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
    """Namespace: cached prefixes and the shared data of proposers are shared between requests of equal salt only."""
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
    progress: bool = False
    """If True, every step of the prefill is reported as a `PrefillProgress`."""
    id: str = ""
    """The caller's identifier, for logs."""


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
