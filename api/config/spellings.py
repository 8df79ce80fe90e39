"""Command-line flags and environment variables of each setting: llama-server's, where llama-server has the setting."""

from __future__ import annotations

from typing import NamedTuple

from msgspec import Struct

from api.config.server import ChatConfig, ServerConfig
from engine import (
    BatchConfig,
    DraftConfig,
    MemoryConfig,
    ModelConfig,
    SamplingParams,
    SimConfig,
    SpeculationConfig,
)


class Spelling(NamedTuple):
    """How a setting is given outside a configuration file."""

    flags: tuple[str, ...]
    env: str
    """Environment variable; empty if there is none."""
    comma_separated: bool
    """True if one argument may hold several values of text, separated by commas."""


def _flags(*flags: str, env: str = "", comma_separated: bool = False) -> Spelling:
    return Spelling(flags, env, comma_separated)


# `logit_bias` of SamplingParams has no flag: only requests have it.
SPELLINGS: dict[type[Struct], dict[str, Spelling]] = {
    ModelConfig: {
        "path": _flags("-m", "--model", env="LLAMA_ARG_MODEL"),
        "gpu_layers": _flags("-ngl", "--gpu-layers", "--n-gpu-layers", env="LLAMA_ARG_N_GPU_LAYERS"),
        "device": _flags("-dev", "--device", env="LLAMA_ARG_DEVICE"),
        "split_mode": _flags("-sm", "--split-mode", env="LLAMA_ARG_SPLIT_MODE"),
        "tensor_split": _flags("-ts", "--tensor-split", env="LLAMA_ARG_TENSOR_SPLIT"),
        "main_gpu": _flags("-mg", "--main-gpu", env="LLAMA_ARG_MAIN_GPU"),
        "fit": _flags("-fit", "--fit", env="LLAMA_ARG_FIT"),
        "fit_target": _flags("-fitt", "--fit-target", env="LLAMA_ARG_FIT_TARGET"),
        "threads": _flags("-t", "--threads", env="LLAMA_ARG_THREADS"),
        "threads_batch": _flags("-tb", "--threads-batch"),
        "kv_unified": _flags("-kvu", "--kv-unified", env="LLAMA_ARG_KV_UNIFIED"),
        "flash_attention": _flags("-fa", "--flash-attn", env="LLAMA_ARG_FLASH_ATTN"),
        "cache_type_k": _flags("-ctk", "--cache-type-k", env="LLAMA_ARG_CACHE_TYPE_K"),
        "cache_type_v": _flags("-ctv", "--cache-type-v", env="LLAMA_ARG_CACHE_TYPE_V"),
        "deterministic": _flags("--deterministic"),
        "warmup": _flags("--warmup"),
        "calibrate": _flags("--calibrate"),
    },
    BatchConfig: {
        "context": _flags("-c", "--ctx-size", env="LLAMA_ARG_CTX_SIZE"),
        "slots": _flags("-np", "--parallel", env="LLAMA_ARG_N_PARALLEL"),
        "queue": _flags("--queue"),
        "rows": _flags("-b", "--batch-size", env="LLAMA_ARG_BATCH"),
        "ubatch": _flags("-ub", "--ubatch-size", env="LLAMA_ARG_UBATCH"),
        "outputs": _flags("--outputs"),
        "context_shift": _flags("--context-shift", env="LLAMA_ARG_CONTEXT_SHIFT"),
        "keep": _flags("--keep"),
        "step_ms": _flags("--step-ms"),
        "idle_step_ms": _flags("--idle-step-ms"),
    },
    MemoryConfig: {
        "ram": _flags("-cram", "--cache-ram", env="LLAMA_ARG_CACHE_RAM"),
        "reuse": _flags("--cache-reuse", env="LLAMA_ARG_CACHE_REUSE"),
        "disk": _flags("--cache-disk"),
        "disk_max": _flags("--cache-disk-max"),
    },
    SpeculationConfig: {
        "types": _flags("--spec-type", env="LLAMA_ARG_SPEC_TYPE"),
        "order": _flags("--spec-order"),
        "default": _flags("--spec-default"),
        "size_n": _flags("--spec-ngram-size-n"),
        "size_m": _flags("--spec-ngram-size-m", "--spec-ngram-m"),
        "min_hits": _flags("--spec-ngram-min-hits"),
        "simple_size_n": _flags("--spec-ngram-simple-size-n"),
        "simple_size_m": _flags("--spec-ngram-simple-size-m"),
        "simple_min_hits": _flags("--spec-ngram-simple-min-hits"),
        "map_k_size_n": _flags("--spec-ngram-map-k-size-n"),
        "map_k_size_m": _flags("--spec-ngram-map-k-size-m"),
        "map_k_min_hits": _flags("--spec-ngram-map-k-min-hits"),
        "map_k4v_size_n": _flags("--spec-ngram-map-k4v-size-n"),
        "map_k4v_size_m": _flags("--spec-ngram-map-k4v-size-m"),
        "map_k4v_min_hits": _flags("--spec-ngram-map-k4v-min-hits"),
        "mod_match": _flags("--spec-ngram-mod-n-match"),
        "mod_min": _flags("--spec-ngram-mod-n-min"),
        "mod_max": _flags("--spec-ngram-mod-n-max"),
        "pool_scope": _flags("--spec-pool-scope"),
        "pool_file": _flags("--spec-pool-file"),
        "cache_max": _flags("--spec-ngram-cache-n-max"),
        "lookup_static": _flags("-lcs", "--lookup-cache-static"),
        "lookup_dynamic": _flags("-lcd", "--lookup-cache-dynamic"),
        "suffix_factor": _flags("--spec-suffix-factor"),
        "suffix_depth": _flags("--spec-suffix-depth"),
        "suffix_p_min": _flags("--spec-suffix-p-min"),
        "suffix_tokens": _flags("--spec-suffix-tokens"),
    },
    DraftConfig: {
        "path": _flags("-md", "--model-draft", "--spec-draft-model", env="LLAMA_ARG_SPEC_DRAFT_MODEL"),
        "context": _flags("-cd", "--ctx-size-draft", env="LLAMA_ARG_CTX_SIZE_DRAFT"),
        "gpu_layers": _flags(
            "-ngld",
            "--gpu-layers-draft",
            "--n-gpu-layers-draft",
            "--spec-draft-ngl",
            env="LLAMA_ARG_N_GPU_LAYERS_DRAFT",
        ),
        "device": _flags("-devd", "--device-draft", "--spec-draft-device"),
        "threads": _flags("-td", "--threads-draft", "--spec-draft-threads"),
        "threads_batch": _flags("-tbd", "--threads-batch-draft", "--spec-draft-threads-batch"),
        "cache_type_k": _flags(
            "-ctkd", "--cache-type-k-draft", "--spec-draft-type-k", env="LLAMA_ARG_SPEC_DRAFT_CACHE_TYPE_K"
        ),
        "cache_type_v": _flags(
            "-ctvd", "--cache-type-v-draft", "--spec-draft-type-v", env="LLAMA_ARG_SPEC_DRAFT_CACHE_TYPE_V"
        ),
        "noise": _flags("--draft-noise"),
        "n_max": _flags("--draft-max", "--draft", "--draft-n", "--spec-draft-n-max", env="LLAMA_ARG_SPEC_DRAFT_N_MAX"),
        "n_min": _flags("--draft-min", "--draft-n-min", "--spec-draft-n-min", env="LLAMA_ARG_SPEC_DRAFT_N_MIN"),
        "p_min": _flags("--draft-p-min", "--spec-draft-p-min", env="LLAMA_ARG_SPEC_DRAFT_P_MIN"),
    },
    SimConfig: {
        "on": _flags("--sim"),
        "cost": _flags("--sim-cost"),
        "accept": _flags("--sim-accept"),
        "seed": _flags("--sim-seed"),
    },
    ServerConfig: {
        "host": _flags("--host", env="LLAMA_ARG_HOST"),
        "port": _flags("--port", env="LLAMA_ARG_PORT"),
        "alias": _flags("-a", "--alias", env="LLAMA_ARG_ALIAS"),
        "api_keys": _flags("--api-key", env="LLAMA_API_KEY", comma_separated=True),
        "cache_salt_by_key": _flags("--cache-salt-by-key"),
        "slots_endpoint": _flags("--slots", env="LLAMA_ARG_ENDPOINT_SLOTS"),
        "slot_save_path": _flags("--slot-save-path"),
        "sse_ping": _flags("--sse-ping", "--sse-ping-interval", env="LLAMA_ARG_SSE_PING_INTERVAL"),
        "grace": _flags("--grace"),
        "max_body": _flags("--max-body"),
        "verbose": _flags("-v", "--verbose"),
    },
    ChatConfig: {
        "template": _flags("--chat-template", env="LLAMA_ARG_CHAT_TEMPLATE"),
        "template_file": _flags("--chat-template-file", env="LLAMA_ARG_CHAT_TEMPLATE_FILE"),
        "template_kwargs": _flags(
            "--chat-template-kwargs", "--default-chat-template-kwargs", env="LLAMA_ARG_CHAT_TEMPLATE_KWARGS"
        ),
        "trust_request_template": _flags("--trust-request-chat-template"),
        "reasoning_format": _flags("--reasoning-format", env="LLAMA_ARG_THINK"),
        "reasoning_budget": _flags("--reasoning-budget", env="LLAMA_ARG_THINK_BUDGET"),
        "prefill_assistant": _flags("--prefill-assistant", env="LLAMA_ARG_PREFILL_ASSISTANT"),
    },
    SamplingParams: {
        "temperature": _flags("--temp", "--temperature", env="LLAMA_ARG_TEMPERATURE"),
        "top_k": _flags("--top-k", env="LLAMA_ARG_TOP_K"),
        "top_p": _flags("--top-p", env="LLAMA_ARG_TOP_P"),
        "min_p": _flags("--min-p", env="LLAMA_ARG_MIN_P"),
        "typical_p": _flags("--typical", "--typical-p"),
        "repeat_penalty": _flags("--repeat-penalty", env="LLAMA_ARG_REPEAT_PENALTY"),
        "repeat_last_n": _flags("--repeat-last-n"),
        "presence_penalty": _flags("--presence-penalty", env="LLAMA_ARG_PRESENCE_PENALTY"),
        "frequency_penalty": _flags("--frequency-penalty", env="LLAMA_ARG_FREQUENCY_PENALTY"),
        "dry_multiplier": _flags("--dry-multiplier"),
        "dry_base": _flags("--dry-base"),
        "dry_allowed_length": _flags("--dry-allowed-length"),
        "dry_penalty_last_n": _flags("--dry-penalty-last-n"),
        "dry_sequence_breakers": _flags("--dry-sequence-breaker"),
        "xtc_probability": _flags("--xtc-probability"),
        "xtc_threshold": _flags("--xtc-threshold"),
        "seed": _flags("-s", "--seed"),
    },
}

# Accepted and ignored: flags of llama-server for behaviour that is always on here, or that does not exist here.
IGNORED_FLAGS = (
    "--jinja",
    "--metrics",
    "--props",
    "--no-webui",
    "--no-ui",
    "-cb",
    "--cont-batching",
    "--log-disable",
    "--spec-draft-backend-sampling",
    "--no-spec-draft-backend-sampling",
)
IGNORED_FLAGS_WITH_VALUE = ("--spec-draft-p-split", "--draft-p-split", "--spec-draft-sampling")

# llama-server's names of proposer types that have another name here.
PROPOSER_TYPE_ALIASES = {"draft-simple": "draft"}
