"""The options of `paceline serve` as one Struct."""

from __future__ import annotations

from msgspec import Struct

from api.config.server import ChatConfig, ServerConfig
from engine import (
    BatchConfig,
    DraftConfig,
    EmbeddingConfig,
    EngineConfig,
    MemoryConfig,
    ModelConfig,
    SamplingParams,
    SimConfig,
    SpeculationConfig,
)


class Options(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings of a server; each field is a table of a `--config` file."""

    model: ModelConfig
    batch: BatchConfig = BatchConfig()
    memory: MemoryConfig = MemoryConfig()
    speculation: SpeculationConfig = SpeculationConfig()
    draft: DraftConfig = DraftConfig()
    sim: SimConfig = SimConfig()
    embedding: EmbeddingConfig = EmbeddingConfig()
    server: ServerConfig = ServerConfig()
    chat: ChatConfig = ChatConfig()
    sampling: SamplingParams = SamplingParams()

    @property
    def engine(self) -> EngineConfig:
        """The part of the settings that the engine uses."""
        return EngineConfig(
            model=self.model,
            batch=self.batch,
            memory=self.memory,
            speculation=self.speculation,
            draft=self.draft,
            sim=self.sim,
            embedding=self.embedding,
        )
