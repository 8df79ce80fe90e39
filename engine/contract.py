"""What crosses between a caller and the engine thread: requests in, updates out, and errors.

    EngineError
    ├── RequestRefused      the caller's fault: 400
    │   └── ContextExceeded   the prompt alone is longer than a request may be
    ├── Overloaded          try again later: 429 with Retry-After
    ├── Draining            the engine is ending and takes nothing new: 503
    ├── ModelError          the model cannot be opened; there is no engine
    └── EngineFault         ours: 500; `fatal` says whether the engine survived

Every request gets any number of `Tokens` and then exactly one terminal update: `Finished` or `Failed`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal, get_args

from msgspec import Meta, Struct

from engine.grammar import Grammar


class EngineError(Exception):
    """Anything the engine reports to a caller."""


class RequestRefused(EngineError):
    """The request can never run as asked; `field` names the part of it that is wrong."""

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class CompiledTooSlowly(RequestRefused):
    """The grammar was not ready in time, maybe as others were being made."""


class ContextExceeded(RequestRefused):
    """The prompt of `prompt_tokens` leaves no room for one new token in a context of `limit`."""

    def __init__(self, prompt_tokens: int, limit: int, slots: int = 0) -> None:
        """`slots` is the number of slots that share the context evenly; 0 if a request may have all of it."""
        share = f" (each of {slots} slots has its own part of --ctx-size)" if slots else ""
        remedy = "a larger --ctx-size, fewer --parallel slots or --kv-unified" if slots else "a larger --ctx-size"
        super().__init__(
            f"This model's maximum context length is {limit} tokens{share}, but the prompt has {prompt_tokens}. "
            f"Shorten the prompt or serve with {remedy}.",
            field="prompt",
        )
        self.prompt_tokens = prompt_tokens
        self.limit = limit


class Overloaded(EngineError):
    """The queue is full; `retry_after` seconds is an estimate of when it will not be."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"All slots are busy and the queue is full. Retry in {retry_after:.0f} s.")
        self.retry_after = retry_after


class Draining(EngineError):
    """The engine is shutting down."""

    def __init__(self) -> None:
        super().__init__("The server is shutting down and takes no new requests.")


class ModelError(EngineError):
    """The model cannot be opened; the message is one line that says why."""


class EngineFault(EngineError):
    """A failure that is not the caller's; after a `fatal` one the engine serves nothing more."""

    def __init__(self, message: str, *, fatal: bool = False) -> None:
        super().__init__(message)
        self.fatal = fatal


Share = Annotated[float, Meta(ge=0.0, le=1.0)]
"""A number from 0 to 1."""
Window = Annotated[int, Meta(ge=-1)]
"""A number of most recent tokens; -1 is all of them, 0 none."""


class SamplingParams(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a token is picked from a row of logits. Defaults and names are llama-server's.

    The stages run in this order: logit_bias, penalties, DRY, top_k, typical_p, top_p, min_p, XTC, temperature.
    Ranges hold for values made by `msgspec.convert`; the constructor itself does not check them.
    """

    temperature: Annotated[float, Meta(ge=0.0, le=100.0, description="0 picks the likeliest token")] = 0.8
    top_k: Annotated[int, Meta(ge=-1, description="keep the k likeliest tokens; 0 or -1 keeps all")] = 40
    top_p: Annotated[Share, Meta(description="keep the likeliest tokens that together hold this share")] = 0.95
    min_p: Annotated[Share, Meta(description="drop tokens below this share of the likeliest one's")] = 0.05
    typical_p: Annotated[Share, Meta(description="locally typical sampling; 1 is off")] = 1.0
    repeat_penalty: Annotated[float, Meta(gt=0.0, le=100.0, description="weakens tokens seen already; 1 is off")] = 1.0
    repeat_last_n: Annotated[Window, Meta(description="tokens that the three penalties look back on")] = 64
    presence_penalty: Annotated[
        float, Meta(ge=-100.0, le=100.0, description="taken off the logit of a token seen already; 0 is off")
    ] = 0.0
    frequency_penalty: Annotated[
        float, Meta(ge=-100.0, le=100.0, description="the same, for each time it was seen; 0 is off")
    ] = 0.0
    dry_multiplier: Annotated[float, Meta(ge=0.0, le=100.0, description="DRY repetition penalty; 0 is off")] = 0.0
    dry_base: Annotated[float, Meta(ge=1.0, le=100.0, description="growth per repeated token")] = 1.75
    dry_allowed_length: Annotated[int, Meta(ge=0, description="repeats up to this many tokens are free")] = 2
    dry_penalty_last_n: Annotated[Window, Meta(description="tokens that DRY looks back on")] = 64
    dry_sequence_breakers: Annotated[tuple[str, ...], Meta(description="texts that end a repeat")] = (
        "\n",
        ":",
        '"',
        "*",
    )
    xtc_probability: Annotated[Share, Meta(description="chance that XTC acts on a token; 0 is off")] = 0.0
    xtc_threshold: Annotated[Share, Meta(description="XTC drops all but the least of those above this")] = 0.1
    logit_bias: Annotated[tuple[tuple[int, float], ...], Meta(description="added to a token's logit")] = ()
    seed: Annotated[
        Annotated[int, Meta(ge=0, le=2**63 - 1)] | None,
        Meta(description="seed for requests that bring none; without it each draws its own"),
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
"""The kinds of proposers, in the order in which a fixed order asks them."""
PROPOSER_TYPES: tuple[ProposerType, ...] = get_args(ProposerType)
Length = Annotated[int, Meta(ge=0, le=1024)]
"""Tokens of a draft."""


class Speculation(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who guesses for a request, and how much. None of the bounds is the same as the server's."""

    type: tuple[ProposerType | Literal["auto"], ...] = ()
    """Nobody guesses if it is empty; `auto` is everyone there is."""
    n_max: Annotated[int, Meta(ge=1, le=1024)] | None = None
    """Tokens of a draft at most."""
    n_min: Length | None = None
    """A shorter draft is not verified."""
    p_min: Share | None = None
    """A draft ends before a token that its proposer thinks less likely than this."""
    size_n: Annotated[int, Meta(ge=1, le=1024)] | None = None
    """Tokens that must recur before `ngram-simple` and the `ngram-map` types guess."""
    min_hits: Annotated[int, Meta(ge=1, le=1024)] | None = None
    """How often they must have occurred."""
    order: Literal["measured", "fixed"] | None = None
    """Whether lengths and types are chosen by what was measured, or the first draft is verified whole."""


class ReasoningBudget(Struct, frozen=True):
    """A bound on what is thought before the answer: once so many tokens of it are there, `closing` follows."""

    tokens: int
    opens: str
    """The text that begins it; empty if the prompt ends with that."""
    closes: str
    """The text that ends it."""
    closing: tuple[int, ...]
    """The tokens of that text, emitted in turn whatever the model would pick."""


class Request(Struct, frozen=True, kw_only=True):
    """One continuation of one prompt."""

    prompt: tuple[int, ...]
    """Token ids, special ones included; at least one."""
    max_tokens: int | None = None
    """New tokens at most; None is up to the end of the context. 0 only reads the prompt."""
    min_tokens: int = 0
    """Neither an end token nor a stop token is picked before this many tokens, unless the grammar leaves no other."""
    sampling: SamplingParams = SamplingParams()
    stop: tuple[str, ...] = ()
    """Texts that end the continuation; the earliest to appear wins and is never part of the text."""
    stop_tokens: tuple[int, ...] = ()
    """Tokens that end the continuation besides the model's own, and are never part of it."""
    ignore_eos: bool = False
    """The model's end tokens are never picked, unless the grammar leaves no other."""
    logprobs: int | None = None
    """Alternatives to report for each token; None reports no logprobs at all."""
    grammar: Grammar | None = None
    """What the continuation must look like, from `Engine.compile`: an end token is picked only where it may end, and
    where nothing else may follow it ends by itself."""
    salt: str = ""
    """Prefixes, and what proposers learn from a text, are shared only between requests of equal salt."""
    speculation: Speculation | None = None
    """Who guesses; None is the engine's default."""
    prediction: tuple[int, ...] = ()
    """Token ids that the continuation is expected to have, in about this order; they are guessed from unless
    `speculation` says nobody is."""
    spelled: tuple[tuple[int, str], ...] = ()
    """Control tokens that are shown, each with its text. Others have none."""
    reasoning: ReasoningBudget | None = None
    """How long it may think; None is as long as it likes."""
    progress: bool = False
    """Whether to tell after each step how far its prompt is read."""
    id: str = ""
    """The caller's name for the request, for logs."""


class FinishReason(StrEnum):
    """Why a request came to its end."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


class Logprob(Struct, frozen=True):
    """A token's log probability under the raw logits of the row that emitted it, and the likeliest tokens there."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Reading(Struct, frozen=True):
    """How far a prompt is read, so many seconds after that began."""

    prompt: int
    cached: int
    """Of the prompt's tokens, those that needed no computing."""
    processed: int
    """Of the prompt's tokens, those that are known, `cached` included."""
    seconds: float


class Tokens(Struct, frozen=True):
    """New tokens in order, and the text that may be shown now that they are known.

    The text lags behind the tokens while it could still become a stop string or lacks the rest of a character.
    """

    ids: tuple[int, ...]
    text: str
    logprobs: tuple[Logprob, ...] = ()
    reading: Reading | None = None
    """How far the prompt is read; an update that tells this has no tokens."""


class Usage(Struct, frozen=True):
    """Tokens of one request. `cached` of the prompt's were not computed for it."""

    prompt: int
    cached: int
    completion: int
    """Tokens picked, the end token included."""
    drafted: int = 0
    accepted: int = 0
    moved: int = 0
    """Of the cached tokens, those that were computed at other places or after another text: not quite the same."""


class Drafts(Struct, frozen=True):
    """What became of the drafts of one type in one request."""

    type: str
    drafted: int
    """Tokens verified."""
    by_accepted: tuple[int, ...]
    """Drafts by how many of their tokens were right, from 0 on."""
    expected: float = 0.0
    """Tokens that were expected to be."""
    saved: float = 0.0
    """Seconds that these would have taken everybody without drafts."""
    spent: float = 0.0
    """Seconds that making and verifying all of them took."""
    chance: float = 0.0
    """As of now, that the first token of another one is right."""

    @property
    def accepted(self) -> int:
        """Tokens that were right."""
        return sum(tokens * drafts for tokens, drafts in enumerate(self.by_accepted))


class Timings(Struct, frozen=True):
    """Seconds from submission to the first step, from there to the first token, and from there to the end."""

    queue: float
    prompt: float
    predicted: float


class Finished(Struct, frozen=True):
    """The last update of a request that ran to its end, or was cancelled."""

    reason: FinishReason
    usage: Usage
    timings: Timings
    seed: int
    stop: str | int | None = None
    """The stop string or token that ended it, if one did."""
    drafts: tuple[Drafts, ...] = ()
    """One for each type that was asked to guess."""
    forgotten: int = 0
    """Tokens that it dropped because its context was full."""


class Failed(Struct, frozen=True):
    """The last update of a request that did not."""

    error: EngineError


Update = Tokens | Finished
"""What a caller reads; a `Failed` reaches it as the error it holds, raised."""
