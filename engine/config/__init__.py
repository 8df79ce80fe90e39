"""How an engine is opened. One frozen Struct per concern; every field has its flags, unit and range.

The command line, the keys of a TOML file and the README's table are made from these fields, so nothing is said
twice. Ranges are checked by `msgspec.convert`, not by the constructors: use `convert` for values from elsewhere.
"""

from engine.config.batch import BatchConfig
from engine.config.engine import EngineConfig
from engine.config.flags import flags
from engine.config.memory import MemoryConfig
from engine.config.model import CacheType, ModelConfig, physical_cores, processor
from engine.config.sim import SIM, SimConfig
from engine.config.speculation import DraftConfig, SpeculationConfig

__all__ = [
    "SIM",
    "BatchConfig",
    "CacheType",
    "DraftConfig",
    "EngineConfig",
    "MemoryConfig",
    "ModelConfig",
    "SimConfig",
    "SpeculationConfig",
    "flags",
    "physical_cores",
    "processor",
]
