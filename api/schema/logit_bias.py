"""The `logit_bias` of a request: pairs of a token, or a text whose tokens all get the bias, and the bias."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from engine import RequestRefused, Vocab

# A pair of a token and its bias. The token is an id, or a text whose tokens all get the bias; the bias false bans the
# token.
LogitBias = tuple[int | str, float | bool]

# Maximum entries of one request's `logit_bias`.
MAX_LOGIT_BIASES = 2**16
# The bias of a banned token: far below any logit, and finite, so that a vocabulary of banned tokens can be sampled.
BAN_BIAS = -1e9
_TOKEN_ID = re.compile(r"\d+")
_MAX_TOKEN_DIGITS = 10


def bias_pairs(biases: Mapping[str, float | bool] | Sequence[LogitBias]) -> Sequence[LogitBias]:
    """Returns the pairs of `biases`, with the ids in digits as numbers. Raises RequestRefused for too many pairs, and
    for an id of too many digits."""
    if len(biases) > MAX_LOGIT_BIASES:
        raise RequestRefused(
            f"logit_bias: {len(biases)} entries are too many; send at most {MAX_LOGIT_BIASES}.", field="logit_bias"
        )
    if not isinstance(biases, Mapping):
        return biases
    return [(_token_or_text(token), bias) for token, bias in biases.items()]


def _token_or_text(key: str) -> int | str:
    if not _TOKEN_ID.fullmatch(key):
        return key
    if len(key) > _MAX_TOKEN_DIGITS:
        raise RequestRefused(f"logit_bias: {key[:32]!r} is not a token id.", field="logit_bias")
    return int(key)


def texts_in_biases(pairs: Sequence[LogitBias]) -> list[str]:
    """Returns the texts of `pairs`. Raises RequestRefused if they have more than `MAX_LOGIT_BIASES` characters."""
    texts = [token for token, _ in pairs if isinstance(token, str)]
    if sum(map(len, texts)) > MAX_LOGIT_BIASES:
        raise RequestRefused(
            f"logit_bias: the texts have more than {MAX_LOGIT_BIASES} characters, the maximum.", field="logit_bias"
        )
    return texts


def tokenize_biases(pairs: Sequence[LogitBias], vocab: Vocab) -> list[LogitBias]:
    """Returns `pairs` with one pair for each token of a text. Raises RequestRefused for too many tokens."""
    tokenized: list[LogitBias] = [
        (each, bias)
        for token, bias in pairs
        for each in (vocab.tokenize(token, special=False) if isinstance(token, str) else (token,))
    ]
    bias_pairs(tokenized)
    return tokenized


def numeric_biases(pairs: Sequence[LogitBias]) -> list[tuple[int, float]]:
    """Returns token ids with the numbers to add to their logits. Raises RequestRefused for a bias that is true, a
    negative id and a text."""
    biases = []
    for token, bias in pairs:
        if not isinstance(token, int) or not 0 <= token < 2**63 or bias is True:
            raise RequestRefused(
                f"logit_bias: {str(token)[:32]!r}: {bias!r} is not a bias; map token ids or texts to numbers or false.",
                field="logit_bias",
            )
        biases.append((token, BAN_BIAS if bias is False else float(bias)))
    return biases
