"""The model file and the devices, threads and KV cells that compute it."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta, Struct

from engine.config.flags import flags

CacheType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]


class ModelConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The model file and the devices, threads and KV cells that compute it."""

    path: Annotated[
        str, Meta(min_length=1, description="GGUF file", extra=flags("-m", "--model", env="LLAMA_ARG_MODEL"))
    ]
    gpu_layers: Annotated[
        int,
        Meta(
            ge=-1,
            description="layers kept on the GPU; -1 is all of them",
            extra=flags("-ngl", "--gpu-layers", "--n-gpu-layers", env="LLAMA_ARG_N_GPU_LAYERS"),
        ),
    ] = -1
    device: Annotated[
        str,
        Meta(
            description="devices that compute the model, by ggml's names, separated by commas; empty is the library's "
            "choice",
            extra=flags("-dev", "--device", env="LLAMA_ARG_DEVICE"),
        ),
    ] = ""
    split_mode: Annotated[
        Literal["none", "layer", "row", "tensor"],
        Meta(
            description="how several GPUs share the model: all on --main-gpu, whole layers on each, rows of the "
            "weights on each, or parts of every tensor on each",
            extra=flags("-sm", "--split-mode", env="LLAMA_ARG_SPLIT_MODE"),
        ),
    ] = "layer"
    tensor_split: Annotated[
        str,
        Meta(
            description="proportions in which the devices share the model, as in 3,1; empty is by their free memory",
            extra=flags("-ts", "--tensor-split", env="LLAMA_ARG_TENSOR_SPLIT"),
        ),
    ] = ""
    main_gpu: Annotated[
        int,
        Meta(
            ge=0,
            description="number of the GPU that has the whole model with --split-mode none",
            extra=flags("-mg", "--main-gpu", env="LLAMA_ARG_MAIN_GPU"),
        ),
    ] = 0
    fit: Annotated[
        Literal["on", "off"],
        Meta(
            description="on: as many cells as fit the free memory of the GPUs, at most the training context for each "
            "slot, unless --ctx-size gives a number",
            extra=flags("-fit", "--fit", env="LLAMA_ARG_FIT"),
        ),
    ] = "off"
    fit_target: Annotated[
        int,
        Meta(
            ge=0,
            le=2**30,
            description="MiB that --fit leaves free on each GPU",
            extra=flags("-fitt", "--fit-target", env="LLAMA_ARG_FIT_TARGET"),
        ),
    ] = 1024
    threads: Annotated[
        int,
        Meta(
            ge=-1,
            le=512,
            description="threads of a step with one row; -1 or 0 is the number of physical cores",
            extra=flags("-t", "--threads", env="LLAMA_ARG_THREADS"),
        ),
    ] = -1
    threads_batch: Annotated[
        int,
        Meta(
            ge=-1,
            le=512,
            description="threads of a step with more rows; -1 or 0 is the same as --threads",
            extra=flags("-tb", "--threads-batch"),
        ),
    ] = -1
    kv_unified: Annotated[
        bool | None,
        Meta(
            description="unified KV: all slots share one pool of cells; --no-kv-unified gives each slot cells of its "
            "own, which is faster with many clients. Chosen at start if neither is given: per-slot KV where each slot "
            "gets at least 1,024 tokens, or the training context if that is less",
            extra=flags("-kvu", "--kv-unified", env="LLAMA_ARG_KV_UNIFIED"),
        ),
    ] = None
    flash_attention: Annotated[
        Literal["auto", "on", "off"],
        Meta(
            description="flash attention; auto is the library's choice on a GPU; on a CPU it is off, which is faster, "
            "but on for 32 slots or more with unified KV, with BF16 values in place of F16",
            extra=flags("-fa", "--flash-attn", env="LLAMA_ARG_FLASH_ATTN"),
        ),
    ] = "auto"
    cache_type_k: Annotated[
        CacheType,
        Meta(description="type of a cell's keys", extra=flags("-ctk", "--cache-type-k", env="LLAMA_ARG_CACHE_TYPE_K")),
    ] = "f16"
    cache_type_v: Annotated[
        CacheType,
        Meta(
            description="type of a cell's values", extra=flags("-ctv", "--cache-type-v", env="LLAMA_ARG_CACHE_TYPE_V")
        ),
    ] = "f16"
    deterministic: Annotated[
        bool,
        Meta(
            description="the same seed gives the same output whatever else runs, to the bit, but slower; needs "
            "per-slot KV and a CPU",
            extra=flags("--deterministic"),
        ),
    ] = False
    warmup: Annotated[
        bool,
        Meta(
            description="decode a few rows and compile a grammar at start, which pages the weights in and measures the "
            "machine",
            extra=flags("--warmup"),
        ),
    ] = True
    calibrate: Annotated[
        bool,
        Meta(
            description="measure at start, in a few seconds, what a step of each number of rows costs, and keep the "
            "result for the next start in $XDG_CACHE_HOME/paceline; without it, or without --warmup, costs are learnt "
            "from the steps that serve",
            extra=flags("--calibrate"),
        ),
    ] = True


def processor() -> str:
    """The processor's name."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def physical_cores() -> int:
    """Number of cores this process may run on, hyper-threads of one core counted once; at least 1."""
    cores: set[str] = set()
    available = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    for cpu in available:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text() if siblings.exists() else str(cpu))
    return max(1, len(cores))
