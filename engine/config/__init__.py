"""Configuration of an engine: frozen Structs, whose fields have a type, a range, a default and a description.

The command line, the keys of a TOML file and `api/FLAGS.md` are generated from these fields. The constructors do not
check ranges, so values from outside must go through `msgspec.convert`, which does.

engine       `EngineConfig`, which holds all others but those of `sim`
model        model file, threads, devices and KV types
batch        slots, queue, context and rows
memory       the tiers of the KV cache
speculation  proposers and the draft model
embedding    embeddings and reranking
sim          the simulated model
machine      cores and name of the processor
"""

from engine.config.batch import BatchConfig
from engine.config.embedding import EmbeddingConfig, Pooling
from engine.config.engine import EngineConfig
from engine.config.machine import physical_cores, processor_name
from engine.config.memory import MemoryConfig
from engine.config.model import CacheType, ModelConfig
from engine.config.sim import SIMULATED_MODEL, SimConfig
from engine.config.speculation import DraftConfig, SpeculationConfig

__all__ = [
    "SIMULATED_MODEL",
    "BatchConfig",
    "CacheType",
    "DraftConfig",
    "EmbeddingConfig",
    "EngineConfig",
    "MemoryConfig",
    "ModelConfig",
    "Pooling",
    "SimConfig",
    "SpeculationConfig",
    "physical_cores",
    "processor_name",
]
