"""Embeddings of texts and token ids, for the endpoints of all clients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from api.generation.loaded_model import LoadedModel
from api.http.error_responses import EndpointDisabled
from api.http.request_context import RequestContext
from api.templates.text_tokens import without_added
from engine import WORKERS, Embedding, EmbeddingModel, RequestRefused, Vocab, checkpoint

# Maximum numbers in all vectors of a reply: 2,048 inputs with 4,096 numbers each.
MAX_REPLY_NUMBERS = 2**23
# The value to which the norm 0 scales the largest number of an embedding, so that it fits 16 bits.
_MAX_NORM_VALUE = 32760.0


class EmbeddedInput(NamedTuple):
    """The number of tokens of an input, and its vectors."""

    tokens: int
    vectors: Embedding


def embedding_model(model: LoadedModel) -> EmbeddingModel:
    """Returns the model that computes embeddings. Raises EndpointDisabled if there is none."""
    if model.engine.embeddings is None:
        raise EndpointDisabled(
            "This server does not support embeddings. Start it with `--embeddings` or `--embedding-model`."
        )
    return model.engine.embeddings


async def tokenize_inputs(embedder: EmbeddingModel, inputs: Sequence[Sequence[str | int]]) -> list[list[int]]:
    """Returns the tokens of each input, a mixed list of texts and token ids, computed on a worker thread.

    The model's special tokens are added around the first part, if it is a text.
    """
    return await WORKERS.run(
        lambda: [_tokenize_mixed(embedder.vocab, parts) for parts in inputs],
    )


async def embed_tokens(
    model: LoadedModel,
    context: RequestContext,
    inputs: Sequence[Sequence[int]],
    names: Sequence[str],
    user: str | None = None,
) -> list[EmbeddedInput]:
    """Returns the vectors of each input. `names` has the field of each input in error messages. `user` is the owner of
    the request on a server without API keys.

    Raises RequestRefused for an input that is empty, too long or outside of the vocabulary, and for inputs with too
    many vectors.
    """
    embedder = embedding_model(model)
    for tokens, name in zip(inputs, names, strict=True):
        _check_input(embedder, tokens, name)
    if embedder.info.pooling == "none":
        _check_vectors(sum(map(len, inputs)), embedder.info.width)
    context.tokens += sum(map(len, inputs))
    vectors = await model.engine.embed(inputs, context.owner(user), context.weight)
    return [EmbeddedInput(len(tokens), each) for tokens, each in zip(inputs, vectors, strict=True)]


def normalized(vectors: Embedding, norm: int) -> Embedding:
    """Returns `vectors`, each scaled to 1 in the p-norm `norm`. -1 changes nothing, and 0 scales the largest absolute
    number to 32,760, as in llama-server."""
    if norm < 0:
        return vectors
    sizes = np.abs(vectors.astype(np.float64))
    largest = sizes.max(axis=1, keepdims=True)
    if norm == 0:
        lengths = largest / _MAX_NORM_VALUE
    else:
        ratios = sizes / np.where(largest > 0, largest, 1)  # at most 1, as powers of other numbers may overflow
        lengths = largest * (ratios**norm).sum(axis=1, keepdims=True) ** (1 / norm)
    return (vectors / np.where(lengths > 0, lengths, np.inf)).astype(np.float32)


def _tokenize_mixed(vocab: Vocab, parts: Sequence[str | int]) -> list[int]:
    tokens: list[int] = []
    for index, part in enumerate(parts):
        checkpoint()
        if isinstance(part, int):
            tokens.append(part)
        else:
            found = vocab.tokenize(part, special=True)
            tokens += without_added(vocab, found) if index else found
    return tokens


def _check_vectors(tokens: int, width: int) -> None:
    if tokens * width > MAX_REPLY_NUMBERS:
        raise RequestRefused(
            f"The inputs have {tokens} tokens, and the pooling type 'none' gives each a vector of {width} numbers: "
            f"send at most {MAX_REPLY_NUMBERS // width} tokens, or start the server with another --pooling."
        )


def _check_input(embedder: EmbeddingModel, tokens: Sequence[int], name: str) -> None:
    limit, size = embedder.info.limit, embedder.vocab.size
    if not tokens:
        raise RequestRefused(f"{name} is empty: at least one token is required.", field=name)
    if len(tokens) > limit:
        raise RequestRefused(
            f"{name} is too large: it has {len(tokens)} tokens, and this server embeds at most {limit} "
            "(--embedding-tokens, up to the model's training context).",
            field=name,
        )
    if not 0 <= min(tokens) <= max(tokens) < size:
        raise RequestRefused(f"{name} has a token id outside of 0 to {size - 1}.", field=name)
