"""The options of `paceline serve` as one Struct."""

from __future__ import annotations

from msgspec import Struct

from api.config.generation import GenerationConfig
from api.config.hub import HubConfig
from api.config.server import ChatConfig, KVEventsConfig, LogConfig, ServerConfig
from engine import (
    AdapterConfig,
    BatchConfig,
    CpuConfig,
    DraftConfig,
    EmbeddingConfig,
    EngineConfig,
    LoadConfig,
    MediaConfig,
    MemoryConfig,
    ModelConfig,
    RopeConfig,
    SamplingParams,
    SimConfig,
    SpeculationConfig,
)


class Options(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings of a server; each field is a table of a `--config` file."""

    model: ModelConfig
    hub: HubConfig = HubConfig()
    load: LoadConfig = LoadConfig()
    rope: RopeConfig = RopeConfig()
    cpu: CpuConfig = CpuConfig()
    batch: BatchConfig = BatchConfig()
    memory: MemoryConfig = MemoryConfig()
    speculation: SpeculationConfig = SpeculationConfig()
    draft: DraftConfig = DraftConfig()
    sim: SimConfig = SimConfig()
    embedding: EmbeddingConfig = EmbeddingConfig()
    adapters: AdapterConfig = AdapterConfig()
    media: MediaConfig = MediaConfig()
    server: ServerConfig = ServerConfig()
    kv_events: KVEventsConfig = KVEventsConfig()
    log: LogConfig = LogConfig()
    chat: ChatConfig = ChatConfig()
    generation: GenerationConfig = GenerationConfig()
    sampling: SamplingParams = SamplingParams()

    @property
    def engine(self) -> EngineConfig:
        """The part of the settings that the engine uses."""
        return EngineConfig(
            model=self.model,
            load=self.load,
            rope=self.rope,
            cpu=self.cpu,
            batch=self.batch,
            memory=self.memory,
            speculation=self.speculation,
            draft=self.draft,
            sim=self.sim,
            embedding=self.embedding,
            adapters=self.adapters,
            media=self.media,
        )
