"""Comparison of vocabularies, for draft models and for files of token ids."""

from __future__ import annotations

from hashlib import blake2b

from engine.backend import Vocab
from engine.checksummed import FileFormat

# llama-server's limits (common/speculative.cpp). Models of one family are padded to different sizes, and their first
# ids are special tokens, which may be spelled differently.
_MAX_SIZE_DIFFERENCE = 128
_FIRST_COMPARED_TOKEN = 5


def vocabulary_mismatch(vocab: Vocab, draft: Vocab) -> str:
    """Returns the first reason why token ids of `draft` cannot be used as ids of `vocab`; empty if they can be used."""
    if vocab.kind != draft.kind:
        return f"its vocabulary is of type {draft.kind}, the model's of type {vocab.kind}"
    if vocab.added != draft.added:
        return f"its BOS and EOS tokens around a text are {draft.added}, the model's are {vocab.added} (-1 is none)"
    if abs(vocab.size - draft.size) > _MAX_SIZE_DIFFERENCE:
        return (
            f"its vocabulary has {draft.size} tokens, the model's {vocab.size}; "
            f"they may differ by at most {_MAX_SIZE_DIFFERENCE}"
        )
    for token in range(_FIRST_COMPARED_TOKEN, min(vocab.size, draft.size)):
        if (own := vocab.text(token)) != (other := draft.text(token)):
            return f"its token {token} is {other!r}, the model's is {own!r}"
    return ""


def vocabulary_digest(vocab: Vocab) -> bytes:
    """Returns 32 bytes that are equal only for vocabularies in which every token id is spelled the same."""
    spelled = blake2b(digest_size=32)
    for token in range(vocab.size):
        spelled.update(vocab.text(token).encode("utf-8", "replace") + b"\0")
    return spelled.digest()


def token_file_format(magic: bytes) -> FileFormat:
    """Returns the format of files with token ids; their owner is a `vocabulary_digest`."""
    return FileFormat(magic, 1, 32, "it was written for a model with another vocabulary")
