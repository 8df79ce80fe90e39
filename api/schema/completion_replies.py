"""Replies of POST /completion in llama-server's shape, which OpenAI's replies contain as `__verbose`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import UNSET, Struct, UnsetType

from api.schema.logprobs import MIN_LOGPROB
from api.schema.replies import PromptProgress, TimingsReply, UnenforcedKeywords
from api.schema.token_origins import TokenOrigin
from engine import Logprob, Vocab


class TopProb(Struct, frozen=True):
    """A candidate token with its log probability, or with its probability after the sampling stages."""

    id: int
    token: str
    bytes: list[int]
    logprob: float | UnsetType = UNSET
    prob: float | UnsetType = UNSET

    @classmethod
    def of(cls, vocab: Vocab, token: int, logprob: float, *, post_sampling: bool) -> TopProb:
        """Returns the token with its probability if `post_sampling`, otherwise with its log probability."""
        piece = vocab.piece(token)
        text, values = piece.decode("utf-8", "replace"), list(piece)
        if post_sampling:
            return cls(token, text, values, prob=math.exp(logprob))
        return cls(token, text, values, logprob=max(MIN_LOGPROB, logprob))


class TokenProb(Struct, frozen=True):
    """An emitted token and the most probable tokens at its position, with log probabilities in `logprob` and
    `top_logprobs`, or with probabilities after the sampling stages in `prob` and `top_probs`."""

    id: int
    token: str
    bytes: list[int]
    logprob: float | UnsetType = UNSET
    prob: float | UnsetType = UNSET
    top_logprobs: list[TopProb] | UnsetType = UNSET
    top_probs: list[TopProb] | UnsetType = UNSET

    @classmethod
    def of(cls, vocab: Vocab, entry: Logprob, *, post_sampling: bool) -> TokenProb:
        """Returns the engine's log probabilities of a position, as probabilities if `post_sampling`."""
        own = TopProb.of(vocab, entry.token, entry.logprob, post_sampling=post_sampling)
        top = [TopProb.of(vocab, token, logprob, post_sampling=post_sampling) for token, logprob in entry.top]
        if post_sampling:
            return cls(own.id, own.token, own.bytes, prob=own.prob, top_probs=top)
        return cls(own.id, own.token, own.bytes, logprob=own.logprob, top_logprobs=top)


class LlamaCompletionChunk(Struct, frozen=True, kw_only=True):
    """An event of a stream before its choice has finished."""

    index: int
    content: str
    tokens: Sequence[int]
    stop: bool = False
    id_slot: int
    tokens_predicted: int
    """Tokens emitted so far."""
    tokens_evaluated: int
    """Tokens of the prompt."""
    timings: TimingsReply | UnsetType = UNSET
    prompt_progress: PromptProgress | UnsetType = UNSET
    completion_probabilities: Sequence[TokenProb] | UnsetType = UNSET
    token_origins: list[TokenOrigin] | UnsetType = UNSET


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
    token_origins: list[TokenOrigin] | UnsetType = UNSET
    unenforced_schema_keywords: UnenforcedKeywords | UnsetType = UNSET

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
