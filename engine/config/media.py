"""Settings of images and sounds in prompts."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

# Fraction of `--cache-ram` for the embeddings of images and sounds.
_EMBEDDINGS_FRACTION = 1 / 8


class MediaConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The projector, which encodes images and sounds as embeddings for the model."""

    path: Annotated[
        str,
        Meta(
            description="GGUF file of the projector of a model that reads images or sounds; needs a build with "
            "VISION=1; empty is none"
        ),
    ] = ""
    offload: Annotated[bool, Meta(description="compute the projector on a GPU, if there is one")] = True
    image_min_tokens: Annotated[
        int,
        Meta(
            ge=0,
            le=2**20,
            description="minimum tokens of an image, for projectors of dynamic resolution; 0 is their default",
        ),
    ] = 0
    image_max_tokens: Annotated[
        int,
        Meta(
            ge=0,
            le=2**20,
            description="maximum tokens of an image, for projectors of dynamic resolution; 0 is their default",
        ),
    ] = 0

    def encoded_bytes(self, ram_bytes: int) -> int:
        """Returns the part of `ram_bytes`, the bytes of `--cache-ram`, for cached embeddings; 0 without a projector."""
        return int(ram_bytes * _EMBEDDINGS_FRACTION) if self.path else 0
