"""Configuration of an engine: frozen Structs, whose fields have a type, a range, a default and a description.

The command line, the keys of a TOML file and `api/FLAGS.md` are generated from these fields. The constructors do not
check ranges, so values from outside must go through `msgspec.convert`, which does.

engine       `EngineConfig`, which contains the Structs of all other modules
model        model file, threads, devices and KV types
loading      buffers of tensors, reading of the file, overrides of metadata
rope         scaling of positions
cpu          cores, priority and NUMA nodes of the threads
batch        slots, queue, context and rows
memory       the tiers of the KV cache
speculation  proposers and the draft model
embedding    embeddings and reranking
adapters     LoRA adapters and control vectors
media        the projector of images and sounds
sim          the simulated model
machine      cores and name of the processor, folder of caches
"""

from engine.config.adapters import AdapterConfig
from engine.config.batch import BatchConfig
from engine.config.cpu import CpuConfig
from engine.config.embedding import EmbeddingConfig, Pooling
from engine.config.engine import EngineConfig
from engine.config.loading import LoadConfig
from engine.config.machine import cache_folder, physical_cores, processor_name
from engine.config.media import MediaConfig
from engine.config.memory import MemoryConfig
from engine.config.model import CacheType, ModelConfig
from engine.config.rope import RopeConfig
from engine.config.sim import SIMULATED_MODEL, SimConfig
from engine.config.speculation import DraftConfig, SpeculationConfig

__all__ = [
    "SIMULATED_MODEL",
    "AdapterConfig",
    "BatchConfig",
    "CacheType",
    "CpuConfig",
    "DraftConfig",
    "EmbeddingConfig",
    "EngineConfig",
    "LoadConfig",
    "MediaConfig",
    "MemoryConfig",
    "ModelConfig",
    "Pooling",
    "RopeConfig",
    "SimConfig",
    "SpeculationConfig",
    "cache_folder",
    "physical_cores",
    "processor_name",
]
