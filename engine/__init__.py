"""Continuous batching over llama.cpp for asyncio: the public names, nothing else."""

from engine.backend import ModelInfo, Vocab
from engine.config import BatchConfig, EngineConfig, ModelConfig
from engine.contract import (
    ContextExceeded,
    Draining,
    EngineError,
    EngineFault,
    Finished,
    FinishReason,
    Logprob,
    ModelError,
    Overloaded,
    Request,
    RequestRefused,
    SamplingParams,
    Timings,
    Tokens,
    Update,
    Usage,
)
from engine.engine import Engine
from engine.generation import Generation
from engine.sampling import derive as derive_seed
from engine.stats import Histogram, Stats

__all__ = [
    "BatchConfig",
    "ContextExceeded",
    "Draining",
    "Engine",
    "EngineConfig",
    "EngineError",
    "EngineFault",
    "FinishReason",
    "Finished",
    "Generation",
    "Histogram",
    "Logprob",
    "ModelConfig",
    "ModelError",
    "ModelInfo",
    "Overloaded",
    "Request",
    "RequestRefused",
    "SamplingParams",
    "Stats",
    "Timings",
    "Tokens",
    "Update",
    "Usage",
    "Vocab",
    "derive_seed",
]
