"""Settings of the model: file, devices, threads and KV cells."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

CacheType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]


class ModelConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The model file, the devices and threads that compute the model, and the kind of its KV cells."""

    path: Annotated[str, Meta(min_length=1, description="GGUF file of the model")]
    gpu_layers: Annotated[
        int, Meta(ge=-1, le=2**31 - 1, description="layers offloaded to the GPU; -1 is all of them")
    ] = -1
    device: Annotated[
        str,
        Meta(
            description="ggml's names of the devices that compute the model, separated by commas; empty is llama.cpp's "
            "choice",
        ),
    ] = ""
    split_mode: Annotated[
        Literal["none", "layer", "row", "tensor"],
        Meta(
            description="how several GPUs share the model: none puts the whole model on --main-gpu, layer splits by "
            "layers, row by rows of the weights, tensor splits every tensor"
        ),
    ] = "layer"
    tensor_split: Annotated[
        str,
        Meta(
            description="proportions of the model on the devices, separated by commas, such as 3,1; empty is the "
            "proportions of their free memory"
        ),
    ] = ""
    main_gpu: Annotated[
        int, Meta(ge=0, le=2**31 - 1, description="index of the GPU that holds the whole model with --split-mode none")
    ] = 0
    fit: Annotated[
        Literal["on", "off"],
        Meta(
            description="on allocates as many KV cells as fit the free memory of the GPUs, at most the training "
            "context for each slot; no effect if --ctx-size is given",
        ),
    ] = "off"
    fit_target: Annotated[
        str,
        Meta(
            description="MiB that --fit leaves free on each GPU: one number for all, or one for each GPU, separated by "
            "commas, the last for all further GPUs"
        ),
    ] = "1024"
    fit_context: Annotated[
        int,
        Meta(ge=256, le=2**24, description="minimum KV cells with --fit; the start fails if fewer fit"),
    ] = 256
    threads: Annotated[
        int,
        Meta(ge=-1, le=512, description="threads of a step with one row; 0 or -1 is the number of physical cores"),
    ] = -1
    threads_batch: Annotated[
        int,
        Meta(ge=-1, le=512, description="threads of a step with several rows; 0 or -1 is the same as --threads"),
    ] = -1
    kv_unified: Annotated[
        bool | None,
        Meta(
            description="unified KV: all slots share one pool of cells; --no-kv-unified is per-slot KV, which is "
            "faster with many clients; without either flag, KV is per-slot if each slot gets at least 1,024 tokens, "
            "or the training context if it is shorter, and the model has neither sliding windows nor recurrent layers",
        ),
    ] = None
    flash_attention: Annotated[
        Literal["auto", "on", "off"],
        Meta(
            description="flash attention; auto is llama.cpp's choice on a GPU; auto on a CPU is off, but on with "
            "quantised values, with attention scores of more than 1 GiB, or with unified KV and 32 slots or more, "
            "where BF16 values replace F16"
        ),
    ] = "auto"
    cache_type_k: Annotated[CacheType, Meta(description="type of the keys in the KV cache")] = "f16"
    cache_type_v: Annotated[CacheType, Meta(description="type of the values in the KV cache")] = "f16"
    kv_offload: Annotated[
        bool, Meta(description="keep the KV cache on the GPUs of its layers; --no-kv-offload keeps it in RAM")
    ] = True
    op_offload: Annotated[bool, Meta(description="let a GPU compute large operations on weights that are in RAM")] = (
        True
    )
    swa_full: Annotated[
        bool,
        Meta(
            description="keep the cells of all positions in layers with a sliding window too, so that prefixes can end "
            "anywhere"
        ),
    ] = False
    backend_sampling: Annotated[
        Literal["auto", "on", "off"],
        Meta(
            description="let the device that computes the logits select the most likely tokens of each row, so that "
            "only those are copied and sampled; requests that need all logits get them; the output is the same; auto "
            "is on if a GPU computes the last layer",
        ),
    ] = "auto"
    deterministic: Annotated[
        bool,
        Meta(
            description="deterministic profile: the same seed gives the same output, bit by bit, independent of other "
            "requests; slower; requires per-slot KV and a CPU",
        ),
    ] = False
    warmup: Annotated[
        bool,
        Meta(
            description="decode a few rows and compile a grammar at start, so that the weights are in memory and a "
            "first cost of a step is measured before the first request",
        ),
    ] = True
    calibrate: Annotated[
        bool,
        Meta(
            description="measure at start, in a few seconds, how the cost of a step depends on its rows, and cache the "
            "result in $XDG_CACHE_HOME/paceline; with --no-calibrate or --no-warmup, costs are measured on served "
            "steps",
        ),
    ] = True
