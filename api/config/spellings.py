"""Command-line flags and environment variables of each setting, with llama-server's names where they exist."""

from __future__ import annotations

from typing import NamedTuple

from msgspec import Struct

from api.config.server import ChatConfig, ServerConfig
from engine import (
    BatchConfig,
    DraftConfig,
    EmbeddingConfig,
    MemoryConfig,
    ModelConfig,
    SamplingParams,
    SimConfig,
    SpeculationConfig,
)


class Spelling(NamedTuple):
    """The command-line flags and the environment variable of one setting."""

    flags: tuple[str, ...]
    env: str
    """Environment variable; empty if there is none."""
    comma_separated: bool
    """True if one argument may hold several values of text, separated by commas."""
    default_flag: str
    """Flag whose value is the default; empty if the field has a default of its own."""


def _spelling(*flags: str, env: str = "", comma_separated: bool = False, default_flag: str = "") -> Spelling:
    return Spelling(flags, env, comma_separated, default_flag)


# `logit_bias` of SamplingParams has no flag: only requests have it.
SPELLINGS: dict[type[Struct], dict[str, Spelling]] = {
    ModelConfig: {
        "path": _spelling("-m", "--model", env="LLAMA_ARG_MODEL"),
        "gpu_layers": _spelling("-ngl", "--gpu-layers", "--n-gpu-layers", env="LLAMA_ARG_N_GPU_LAYERS"),
        "device": _spelling("-dev", "--device", env="LLAMA_ARG_DEVICE"),
        "split_mode": _spelling("-sm", "--split-mode", env="LLAMA_ARG_SPLIT_MODE"),
        "tensor_split": _spelling("-ts", "--tensor-split", env="LLAMA_ARG_TENSOR_SPLIT"),
        "main_gpu": _spelling("-mg", "--main-gpu", env="LLAMA_ARG_MAIN_GPU"),
        "fit": _spelling("-fit", "--fit", env="LLAMA_ARG_FIT"),
        "fit_target": _spelling("-fitt", "--fit-target", env="LLAMA_ARG_FIT_TARGET"),
        "threads": _spelling("-t", "--threads", env="LLAMA_ARG_THREADS"),
        "threads_batch": _spelling("-tb", "--threads-batch"),
        "kv_unified": _spelling("-kvu", "--kv-unified", env="LLAMA_ARG_KV_UNIFIED"),
        "flash_attention": _spelling("-fa", "--flash-attn", env="LLAMA_ARG_FLASH_ATTN"),
        "cache_type_k": _spelling("-ctk", "--cache-type-k", env="LLAMA_ARG_CACHE_TYPE_K"),
        "cache_type_v": _spelling("-ctv", "--cache-type-v", env="LLAMA_ARG_CACHE_TYPE_V"),
        "deterministic": _spelling("--deterministic"),
        "warmup": _spelling("--warmup"),
        "calibrate": _spelling("--calibrate"),
    },
    BatchConfig: {
        "context": _spelling("-c", "--ctx-size", env="LLAMA_ARG_CTX_SIZE"),
        "slots": _spelling("-np", "--parallel", env="LLAMA_ARG_N_PARALLEL"),
        "queue": _spelling("--queue"),
        "rows": _spelling("-b", "--batch-size", env="LLAMA_ARG_BATCH"),
        "ubatch": _spelling("-ub", "--ubatch-size", env="LLAMA_ARG_UBATCH"),
        "outputs": _spelling("--outputs"),
        "context_shift": _spelling("--context-shift", env="LLAMA_ARG_CONTEXT_SHIFT"),
        "keep": _spelling("--keep"),
        "step_ms": _spelling("--step-ms"),
        "idle_step_ms": _spelling("--idle-step-ms"),
    },
    MemoryConfig: {
        "ram": _spelling("-cram", "--cache-ram", env="LLAMA_ARG_CACHE_RAM"),
        "reuse": _spelling("--cache-reuse", env="LLAMA_ARG_CACHE_REUSE"),
        "disk": _spelling("--cache-disk"),
        "disk_max": _spelling("--cache-disk-max"),
    },
    SpeculationConfig: {
        "types": _spelling("--spec-type", env="LLAMA_ARG_SPEC_TYPE"),
        "order": _spelling("--spec-order"),
        "default": _spelling("--spec-default"),
        "size_n": _spelling("--spec-ngram-size-n"),
        "size_m": _spelling("--spec-ngram-size-m", "--spec-ngram-m"),
        "min_hits": _spelling("--spec-ngram-min-hits"),
        "simple_size_n": _spelling("--spec-ngram-simple-size-n", default_flag="--spec-ngram-size-n"),
        "simple_size_m": _spelling("--spec-ngram-simple-size-m", default_flag="--spec-ngram-size-m"),
        "simple_min_hits": _spelling("--spec-ngram-simple-min-hits", default_flag="--spec-ngram-min-hits"),
        "map_k_size_n": _spelling("--spec-ngram-map-k-size-n", default_flag="--spec-ngram-size-n"),
        "map_k_size_m": _spelling("--spec-ngram-map-k-size-m", default_flag="--spec-ngram-size-m"),
        "map_k_min_hits": _spelling("--spec-ngram-map-k-min-hits", default_flag="--spec-ngram-min-hits"),
        "map_k4v_size_n": _spelling("--spec-ngram-map-k4v-size-n", default_flag="--spec-ngram-size-n"),
        "map_k4v_size_m": _spelling("--spec-ngram-map-k4v-size-m", default_flag="--spec-ngram-size-m"),
        "map_k4v_min_hits": _spelling("--spec-ngram-map-k4v-min-hits", default_flag="--spec-ngram-min-hits"),
        "mod_match": _spelling("--spec-ngram-mod-n-match"),
        "mod_min": _spelling("--spec-ngram-mod-n-min"),
        "mod_max": _spelling("--spec-ngram-mod-n-max"),
        "pool_scope": _spelling("--spec-pool-scope"),
        "pool_file": _spelling("--spec-pool-file"),
        "cache_max": _spelling("--spec-ngram-cache-n-max"),
        "lookup_static": _spelling("-lcs", "--lookup-cache-static"),
        "lookup_dynamic": _spelling("-lcd", "--lookup-cache-dynamic"),
        "suffix_factor": _spelling("--spec-suffix-factor"),
        "suffix_depth": _spelling("--spec-suffix-depth"),
        "suffix_p_min": _spelling("--spec-suffix-p-min"),
        "suffix_tokens": _spelling("--spec-suffix-tokens"),
    },
    DraftConfig: {
        "path": _spelling("-md", "--model-draft", "--spec-draft-model", env="LLAMA_ARG_SPEC_DRAFT_MODEL"),
        "context": _spelling("-cd", "--ctx-size-draft", env="LLAMA_ARG_CTX_SIZE_DRAFT"),
        "gpu_layers": _spelling(
            "-ngld",
            "--gpu-layers-draft",
            "--n-gpu-layers-draft",
            "--spec-draft-ngl",
            env="LLAMA_ARG_N_GPU_LAYERS_DRAFT",
        ),
        "device": _spelling("-devd", "--device-draft", "--spec-draft-device"),
        "threads": _spelling("-td", "--threads-draft", "--spec-draft-threads"),
        "threads_batch": _spelling("-tbd", "--threads-batch-draft", "--spec-draft-threads-batch"),
        "cache_type_k": _spelling(
            "-ctkd", "--cache-type-k-draft", "--spec-draft-type-k", env="LLAMA_ARG_SPEC_DRAFT_CACHE_TYPE_K"
        ),
        "cache_type_v": _spelling(
            "-ctvd", "--cache-type-v-draft", "--spec-draft-type-v", env="LLAMA_ARG_SPEC_DRAFT_CACHE_TYPE_V"
        ),
        "noise": _spelling("--draft-noise"),
        "n_max": _spelling(
            "--draft-max", "--draft", "--draft-n", "--spec-draft-n-max", env="LLAMA_ARG_SPEC_DRAFT_N_MAX"
        ),
        "n_min": _spelling("--draft-min", "--draft-n-min", "--spec-draft-n-min", env="LLAMA_ARG_SPEC_DRAFT_N_MIN"),
        "p_min": _spelling("--draft-p-min", "--spec-draft-p-min", env="LLAMA_ARG_SPEC_DRAFT_P_MIN"),
    },
    SimConfig: {
        "on": _spelling("--sim"),
        "cost": _spelling("--sim-cost"),
        "accept": _spelling("--sim-accept"),
        "seed": _spelling("--sim-seed"),
    },
    EmbeddingConfig: {
        "on": _spelling("--embeddings", "--embedding", env="LLAMA_ARG_EMBEDDINGS"),
        "path": _spelling("--embedding-model"),
        "pooling": _spelling("--pooling", env="LLAMA_ARG_POOLING"),
        "rerank": _spelling("--reranking", "--rerank", env="LLAMA_ARG_RERANKING"),
        "rows": _spelling("--embedding-tokens"),
        "normalize": _spelling("--embd-normalize"),
    },
    ServerConfig: {
        "host": _spelling("--host", env="LLAMA_ARG_HOST", comma_separated=True),
        "port": _spelling("--port", env="LLAMA_ARG_PORT"),
        "alias": _spelling("-a", "--alias", env="LLAMA_ARG_ALIAS", comma_separated=True),
        "strict_model": _spelling("--strict-model"),
        "api_keys": _spelling("--api-key", env="LLAMA_API_KEY", comma_separated=True),
        "cache_salt_by_key": _spelling("--cache-salt-by-key"),
        "cors_origins": _spelling("--cors-origins", env="LLAMA_ARG_CORS_ORIGINS", comma_separated=True),
        "cors_methods": _spelling("--cors-methods", env="LLAMA_ARG_CORS_METHODS", comma_separated=True),
        "cors_headers": _spelling("--cors-headers", env="LLAMA_ARG_CORS_HEADERS", comma_separated=True),
        "cors_credentials": _spelling("--cors-credentials", env="LLAMA_ARG_CORS_CREDENTIALS"),
        "allowed_hosts": _spelling("--allowed-hosts", comma_separated=True),
        "any_content_type": _spelling("--any-content-type"),
        "slots_endpoint": _spelling("--slots", env="LLAMA_ARG_ENDPOINT_SLOTS"),
        "slot_save_path": _spelling("--slot-save-path"),
        "spm_infill": _spelling("--spm-infill"),
        "response_store": _spelling("--response-store"),
        "sse_ping": _spelling("--sse-ping", "--sse-ping-interval", env="LLAMA_ARG_SSE_PING_INTERVAL"),
        "grace": _spelling("--grace"),
        "max_body": _spelling("--max-body"),
        "verbose": _spelling("-v", "--verbose"),
    },
    ChatConfig: {
        "template": _spelling("--chat-template", env="LLAMA_ARG_CHAT_TEMPLATE"),
        "template_file": _spelling("--chat-template-file", env="LLAMA_ARG_CHAT_TEMPLATE_FILE"),
        "template_kwargs": _spelling(
            "--chat-template-kwargs", "--default-chat-template-kwargs", env="LLAMA_ARG_CHAT_TEMPLATE_KWARGS"
        ),
        "trust_request_template": _spelling("--trust-request-chat-template"),
        "reasoning_format": _spelling("--reasoning-format", env="LLAMA_ARG_THINK"),
        "reasoning_budget": _spelling("--reasoning-budget", env="LLAMA_ARG_THINK_BUDGET"),
        "prefill_assistant": _spelling("--prefill-assistant", env="LLAMA_ARG_PREFILL_ASSISTANT"),
    },
    SamplingParams: {
        "temperature": _spelling("--temp", "--temperature", env="LLAMA_ARG_TEMPERATURE"),
        "top_k": _spelling("--top-k", env="LLAMA_ARG_TOP_K"),
        "top_p": _spelling("--top-p", env="LLAMA_ARG_TOP_P"),
        "min_p": _spelling("--min-p", env="LLAMA_ARG_MIN_P"),
        "typical_p": _spelling("--typical", "--typical-p"),
        "repeat_penalty": _spelling("--repeat-penalty", env="LLAMA_ARG_REPEAT_PENALTY"),
        "repeat_last_n": _spelling("--repeat-last-n"),
        "presence_penalty": _spelling("--presence-penalty", env="LLAMA_ARG_PRESENCE_PENALTY"),
        "frequency_penalty": _spelling("--frequency-penalty", env="LLAMA_ARG_FREQUENCY_PENALTY"),
        "dry_multiplier": _spelling("--dry-multiplier"),
        "dry_base": _spelling("--dry-base"),
        "dry_allowed_length": _spelling("--dry-allowed-length"),
        "dry_penalty_last_n": _spelling("--dry-penalty-last-n"),
        "dry_sequence_breakers": _spelling("--dry-sequence-breaker"),
        "xtc_probability": _spelling("--xtc-probability"),
        "xtc_threshold": _spelling("--xtc-threshold"),
        "seed": _spelling("-s", "--seed"),
    },
}

# Flags of llama-server that are accepted without effect: the behaviour is always on here, or does not exist here.
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

# Paceline's name for each proposer type that llama-server names differently.
PROPOSER_TYPE_ALIASES = {"draft-simple": "draft"}
