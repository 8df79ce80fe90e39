"""The configuration of an engine."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
from msgspec import Struct, structs

from engine.config.adapters import AdapterConfig
from engine.config.batch import BatchConfig
from engine.config.cpu import CpuConfig
from engine.config.embedding import EmbeddingConfig
from engine.config.loading import LoadConfig
from engine.config.media import MediaConfig
from engine.config.memory import MemoryConfig
from engine.config.model import ModelConfig
from engine.config.rope import RopeConfig
from engine.config.sim import SimConfig
from engine.config.speculation import DraftConfig, SpeculationConfig


class EngineConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings of an engine; `EngineConfig.of(path="model.gguf", slots=4)` is the short form."""

    model: ModelConfig
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

    @classmethod
    def of(
        cls,
        *,
        load: LoadConfig | dict[str, object] | None = None,
        rope: RopeConfig | dict[str, object] | None = None,
        cpu: CpuConfig | dict[str, object] | None = None,
        memory: MemoryConfig | dict[str, object] | None = None,
        speculation: SpeculationConfig | dict[str, object] | None = None,
        draft: DraftConfig | dict[str, object] | None = None,
        sim: SimConfig | dict[str, object] | None = None,
        embedding: EmbeddingConfig | dict[str, object] | None = None,
        adapters: AdapterConfig | dict[str, object] | None = None,
        media: MediaConfig | dict[str, object] | None = None,
        **fields: object,
    ) -> EngineConfig:
        """Returns a checked configuration. `fields` are fields of `model` and of `batch`.

        Raises `msgspec.ValidationError` for a wrong type, a value out of range or an unknown name. The message names
        the field.
        """
        model: dict[str, object] = {}
        batch: dict[str, object] = {}
        for name, value in fields.items():
            table = batch if name in BatchConfig.__struct_fields__ else model
            table[name] = os.fspath(value) if isinstance(value, Path) else value
        tables = {
            "model": model,
            "batch": batch,
            "load": load or {},
            "rope": rope or {},
            "cpu": cpu or {},
            "memory": memory or {},
            "speculation": speculation or {},
            "draft": draft or {},
            "sim": sim or {},
            "embedding": embedding or {},
            "adapters": adapters or {},
            "media": media or {},
        }
        return msgspec.convert(tables, cls)

    @property
    def mtp(self) -> bool:
        """True if the MTP layers of a model that has them are loaded."""
        return not self.no_mtp

    @property
    def no_mtp(self) -> str:
        """Reason why the MTP layers of a model that has them are not loaded; empty if they are loaded."""
        if self.draft.path:
            return "the draft model drafts instead"
        types = self.speculation.default_types
        return "" if {"auto", "draft-mtp"} & {*types} else "--spec-type names neither draft-mtp nor auto"

    @property
    def tiers(self) -> MemoryConfig:
        """The sizes of the tiers. With a projector the RAM tier shares its memory with the embeddings of images."""
        encoded = self.media.encoded_bytes(self.memory.ram_bytes)
        return structs.replace(self.memory, ram=(self.memory.ram_bytes - encoded) >> 20) if encoded else self.memory

    def for_draft_model(self, cells: int) -> EngineConfig:
        """Returns the configuration of the draft model's engine. `cells` is the number of the target model's KV cells.

        Settings of `model`, `load`, `rope`, `cpu` and `batch` that `draft` lacks are those of the target model; other
        tables have defaults. The KV layout is per-slot if the target has `--no-kv-unified`, and is chosen at start
        otherwise.
        """
        draft = self.draft
        threads = draft.threads if draft.threads > 0 else self.model.threads
        threads_batch = draft.threads_batch if draft.threads_batch > 0 else draft.threads
        # The target's split over devices is used only if the draft model has the same devices.
        split = ModelConfig(path=draft.path) if draft.device else self.model
        model = structs.replace(
            self.model,
            path=draft.path,
            gpu_layers=draft.gpu_layers,
            device=draft.device or self.model.device,
            split_mode=split.split_mode,
            tensor_split=split.tensor_split,
            main_gpu=split.main_gpu,
            fit="off",
            threads=threads,
            threads_batch=threads_batch if threads_batch > 0 else self.model.threads_batch,
            kv_unified=False if self.model.kv_unified is False else None,
            cache_type_k=draft.cache_type_k,
            cache_type_v=draft.cache_type_v,
            backend_sampling="off",  # the proposer needs all logits
            deterministic=False,
        )
        load = structs.replace(
            self.load,
            override_tensor=draft.override_tensor,
            cpu_moe=draft.cpu_moe,
            n_cpu_moe=draft.n_cpu_moe,
            n_cpu_ffn=0,
        )
        batch = structs.replace(self.batch, context=draft.context or cells, outputs=self.batch.num_slots)
        speculation = SpeculationConfig(types=("none",))  # MTP layers of the draft model do not draft
        return EngineConfig(model=model, load=load, rope=self.rope, cpu=self.cpu, batch=batch, speculation=speculation)
