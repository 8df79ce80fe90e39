"""Settings of LoRA adapters and control vectors."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct


class AdapterConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The LoRA adapters that requests can use, and the control vectors of all requests."""

    lora: Annotated[
        tuple[str, ...],
        Meta(description="GGUF file of a LoRA adapter; adapters are numbered from 0, those of --lora-scaled last"),
    ] = ()
    lora_scaled: Annotated[
        tuple[str, ...],
        Meta(description="GGUF file and scale of a LoRA adapter, such as adapter.gguf:0.5; --lora has the scale 1"),
    ] = ()
    unapplied: Annotated[
        bool,
        Meta(
            description="apply no LoRA adapter until a request names it in its field lora, or until POST "
            "/lora-adapters sets its scale"
        ),
    ] = False
    control_vector: Annotated[
        tuple[str, ...],
        Meta(description="GGUF file of a control vector, which is added to the layers' outputs in every request"),
    ] = ()
    control_vector_scaled: Annotated[
        tuple[str, ...], Meta(description="GGUF file and factor of a control vector, such as vector.gguf:0.8")
    ] = ()
    control_vector_layers: Annotated[
        tuple[int, int] | None,
        Meta(
            description="first and last layer to which control vectors are added; 0 as the first is layer 1, 0 as the "
            "last is the model's last layer; the default is 0 0"
        ),
    ] = None
