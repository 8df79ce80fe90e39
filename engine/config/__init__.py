"""Configuration of an engine: one frozen Struct per concern; each field has a type, a range, a default and a sentence.

The command line, the keys of a TOML file and `api/FLAGS.md` are generated from these fields. `msgspec.convert` checks
ranges and the constructors do not: values from outside go through `convert`.
"""

from engine.config.batch import BatchConfig
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
    "EngineConfig",
    "MemoryConfig",
    "ModelConfig",
    "SimConfig",
    "SpeculationConfig",
    "physical_cores",
    "processor_name",
]
