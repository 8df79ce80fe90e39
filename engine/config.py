"""How an engine is opened. One frozen Struct per concern; every field has its flags, unit and range here.

The command line, the keys of a TOML file and the README's table are made from these fields, so nothing is said
twice. Ranges are checked by `msgspec.convert`, not by the constructors: use `convert` for values from elsewhere.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct


def flags(*names: str) -> dict[str, Any]:
    """The command-line spellings of a field, as `Meta(extra=...)`."""
    return {"flags": names}


CacheType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]


class ModelConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which model, and what computes it."""

    path: Annotated[str, Meta(min_length=1, description="GGUF file", extra=flags("-m", "--model"))]
    gpu_layers: Annotated[
        int,
        Meta(
            ge=-1,
            description="layers kept on the GPU; -1 is all of them",
            extra=flags("-ngl", "--gpu-layers", "--n-gpu-layers"),
        ),
    ] = -1
    threads: Annotated[
        int,
        Meta(
            ge=-1,
            le=512,
            description="threads of a step with one row; -1 or 0 is the number of physical cores",
            extra=flags("-t", "--threads"),
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
    flash_attention: Annotated[
        Literal["auto", "on", "off"],
        Meta(
            description="flash attention; auto is the library's choice on a GPU and off on a CPU, where it is slower",
            extra=flags("-fa", "--flash-attn"),
        ),
    ] = "auto"
    cache_type_k: Annotated[
        CacheType, Meta(description="type of a cell's keys", extra=flags("-ctk", "--cache-type-k"))
    ] = "f16"
    cache_type_v: Annotated[
        CacheType, Meta(description="type of a cell's values", extra=flags("-ctv", "--cache-type-v"))
    ] = "f16"
    warmup: Annotated[
        bool,
        Meta(
            description="run a few rows at start: pages the weights in and measures a first step cost",
            extra=flags("--warmup"),
        ),
    ] = True


class BatchConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much is held, and how much one step may do."""

    context: Annotated[
        int,
        Meta(
            ge=0,
            le=2**24,
            description="cells (tokens) shared by all requests; 0 is the model's training context",
            extra=flags("-c", "--ctx-size"),
        ),
    ] = 0
    slots: Annotated[
        int,
        Meta(ge=1, le=128, description="requests decoded together", extra=flags("-np", "--parallel")),
    ] = 16
    queue: Annotated[
        int,
        Meta(
            ge=0,
            le=100_000,
            description="requests that may wait for a slot; one more gets 429 with Retry-After",
            extra=flags("--queue"),
        ),
    ] = 256
    rows: Annotated[
        int,
        Meta(
            ge=32,
            le=2**16,
            description="rows (tokens) of one decode at most",
            extra=flags("-b", "--batch-size"),
        ),
    ] = 2048
    ubatch: Annotated[
        int,
        Meta(
            ge=32,
            le=2**16,
            description="rows that the library computes in one pass over the weights",
            extra=flags("-ub", "--ubatch-size"),
        ),
    ] = 512
    step_ms: Annotated[
        float,
        Meta(
            ge=0.0,
            le=60_000.0,
            description="milliseconds a step may take while prompts are read beside running streams; "
            "0 is twice a step without prompts, so that streams keep half their speed",
            extra=flags("--step-ms"),
        ),
    ] = 0.0
    idle_step_ms: Annotated[
        float,
        Meta(
            ge=1.0,
            le=60_000.0,
            description="milliseconds a step may take while only prompts are read",
            extra=flags("--idle-step-ms"),
        ),
    ] = 500.0


class EngineConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All of it. `EngineConfig.of(path="model.gguf", slots=4)` fills the concerns by field name."""

    model: ModelConfig
    batch: BatchConfig = BatchConfig()

    @classmethod
    def of(cls, **fields: object) -> EngineConfig:
        """A checked configuration from field names of any concern.

        Raises `msgspec.ValidationError`, which names the field, for a wrong type or range or an unknown name.
        """
        concerns: dict[str, dict[str, object]] = {"model": {}, "batch": {}}
        for name, value in fields.items():
            concern = "batch" if name in BatchConfig.__struct_fields__ else "model"
            concerns[concern][name] = os.fspath(value) if isinstance(value, Path) else value
        return msgspec.convert(concerns, cls)


def physical_cores() -> int:
    """Cores this process may run on, hyper-threads of one core counted once; at least 1."""
    cores: set[str] = set()
    available = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    for cpu in available:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text() if siblings.exists() else str(cpu))
    return max(1, len(cores))
