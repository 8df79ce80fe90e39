"""The origins of emitted tokens in replies: a proposer's draft, the grammar, or the model."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import UNSET, Struct, UnsetType

from engine import Vocab


class TokenOrigin(Struct, frozen=True):
    """An emitted token and its origin."""

    id: int
    token: str
    bytes: list[int]
    origin: str
    """The type of the proposer that drafted the token; `forced` for the only token that the grammar or the reasoning
    budget permitted; `model` for a token that the model's probabilities chose among several."""


def token_origins(vocab: Vocab, ids: Sequence[int], origins: Sequence[str]) -> list[TokenOrigin] | UnsetType:
    """Returns the tokens with their origins. UNSET if there are no origins."""
    if not origins:
        return UNSET
    return [_of(vocab, token, origin) for token, origin in zip(ids, origins, strict=True)]


def _of(vocab: Vocab, token: int, origin: str) -> TokenOrigin:
    piece = vocab.piece(token)
    return TokenOrigin(token, piece.decode("utf-8", "replace"), list(piece), origin)
