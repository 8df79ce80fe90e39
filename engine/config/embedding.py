"""Settings of embeddings and reranking."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

Pooling = Literal["none", "mean", "cls", "last", "rank"]


class EmbeddingConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The model that computes embeddings, and how it pools the vectors of an input's tokens to one vector."""

    on: Annotated[
        bool,
        Meta(
            description="serve embeddings: of the model itself, in a context of its own, unless --embedding-model "
            "names another; a model that only computes embeddings serves them without this flag"
        ),
    ] = False
    path: Annotated[
        str, Meta(description="GGUF file of a second model, which computes the embeddings; empty is no second model")
    ] = ""
    pooling: Annotated[
        Literal["auto", "none", "mean", "cls", "last", "rank"],
        Meta(
            description="pooling of an input's vectors: none is a vector for each token, mean their mean, cls the "
            "first, last the last, rank a score for /rerank, auto the model's own, or mean if the model has none"
        ),
    ] = "auto"
    rerank: Annotated[bool, Meta(description="serve /rerank: the same as --embeddings --pooling rank")] = False
    rows: Annotated[
        int,
        Meta(
            ge=0,
            le=2**16,
            description="maximum tokens of one input of an embedding; 0 is the training context, at most 2,048",
        ),
    ] = 0
    normalize: Annotated[
        int,
        Meta(
            ge=-1,
            le=64,
            description="default norm of a pooled embedding: -1 is unchanged, 0 scales the largest number to 32,760, "
            "1 is taxicab, 2 Euclidean, a larger p is the p-norm",
        ),
    ] = 2

    @property
    def enabled(self) -> bool:
        """True if a model computes embeddings besides the generation."""
        return self.on or self.rerank or bool(self.path)

    @property
    def pooling_type(self) -> Pooling | None:
        """The pooling that the flags choose. None means the model's own."""
        if self.rerank:
            return "rank"
        return None if self.pooling == "auto" else self.pooling
