"""Continuous batching over llama.cpp for asyncio: the public names, nothing else."""

from engine.backend import ModelInfo, Vocab
from engine.config import (
    SIM,
    BatchConfig,
    DraftConfig,
    EngineConfig,
    MemoryConfig,
    ModelConfig,
    SimConfig,
    SpeculationConfig,
)
from engine.contract import (
    PROPOSER_TYPES,
    CompiledTooSlowly,
    ContextExceeded,
    Drafts,
    Draining,
    EngineError,
    EngineFault,
    Finished,
    FinishReason,
    Logprob,
    ModelError,
    Overloaded,
    ProposerType,
    Reading,
    ReasoningBudget,
    Request,
    RequestRefused,
    SamplingParams,
    Speculation,
    Timings,
    Tokens,
    Update,
    Usage,
)
from engine.engine import Engine, MemoryInfo, open_vocabulary, step_costs
from engine.generation import Generation
from engine.grammar import DEPTH as SCHEMA_DEPTH
from engine.grammar import SIZE as FORM_SIZE
from engine.grammar import Choice, Form, Gbnf, Grammar, JsonObject, JsonSchema, Lark, Regex
from engine.pace import Measured
from engine.sampling import derive as derive_seed
from engine.slotfiles import Moved
from engine.slots import Ran, SlotState
from engine.speculate.lookup import build_lookup
from engine.stats import Histogram, Stats

__all__ = [
    "FORM_SIZE",
    "PROPOSER_TYPES",
    "SCHEMA_DEPTH",
    "SIM",
    "BatchConfig",
    "Choice",
    "CompiledTooSlowly",
    "ContextExceeded",
    "DraftConfig",
    "Drafts",
    "Draining",
    "Engine",
    "EngineConfig",
    "EngineError",
    "EngineFault",
    "FinishReason",
    "Finished",
    "Form",
    "Gbnf",
    "Generation",
    "Grammar",
    "Histogram",
    "JsonObject",
    "JsonSchema",
    "Lark",
    "Logprob",
    "Measured",
    "MemoryConfig",
    "MemoryInfo",
    "ModelConfig",
    "ModelError",
    "ModelInfo",
    "Moved",
    "Overloaded",
    "ProposerType",
    "Ran",
    "Reading",
    "ReasoningBudget",
    "Regex",
    "Request",
    "RequestRefused",
    "SamplingParams",
    "SimConfig",
    "SlotState",
    "Speculation",
    "SpeculationConfig",
    "Stats",
    "Timings",
    "Tokens",
    "Update",
    "Usage",
    "Vocab",
    "build_lookup",
    "derive_seed",
    "open_vocabulary",
    "step_costs",
]
