"""Whether a draft model's token ids mean what the model's do. The rules are llama-server's."""

from __future__ import annotations

from engine.backend import Vocab

APART = 128
"""Ids that one vocabulary may have more than the other: models of a family are padded differently."""
FIRST = 5
"""The first ids are special tokens, which may be spelled differently."""


def difference(vocab: Vocab, draft: Vocab) -> str:
    """The first thing in which the two differ so that one cannot draft for the other; empty if there is none."""
    if vocab.kind != draft.kind:
        return f"its vocabulary is of type {draft.kind}, the model's of type {vocab.kind}"
    if vocab.added != draft.added:
        return f"it puts the tokens {draft.added} around a text, the model {vocab.added} (-1 is none)"
    if abs(vocab.size - draft.size) > APART:
        return f"its vocabulary has {draft.size} tokens, the model's {vocab.size}; at most {APART} apart will do"
    for token in range(FIRST, min(vocab.size, draft.size)):
        if (own := vocab.text(token)) != (other := draft.text(token)):
            return f"its token {token} is {other!r}, the model's is {own!r}"
    return ""
