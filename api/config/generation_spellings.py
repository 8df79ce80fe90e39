"""Command-line flags and environment variables of generation and of the default sampling parameters."""

from __future__ import annotations

from msgspec import Struct

from api.config.generation import GenerationConfig
from api.config.spelling import Spelling, spelling
from engine import SamplingParams

# Flags of GenerationConfig set `logit_bias` and `samplers` of SamplingParams; `min_keep` has no flag.
GENERATION_SPELLINGS: dict[type[Struct], dict[str, Spelling]] = {
    GenerationConfig: {
        "n_predict": spelling("-n", "--predict", "--n-predict", env="LLAMA_ARG_N_PREDICT"),
        "ignore_eos": spelling("--ignore-eos"),
        "logit_bias": spelling("-l", "--logit-bias"),
        "samplers": spelling("--samplers"),
        "sampler_seq": spelling("--sampler-seq", "--sampling-seq"),
        "grammar": spelling("--grammar"),
        "grammar_file": spelling("--grammar-file"),
        "json_schema": spelling("-j", "--json-schema"),
        "json_schema_file": spelling("-jf", "--json-schema-file"),
        "reverse_prompt": spelling("-r", "--reverse-prompt"),
        "special": spelling("-sp", "--special"),
        "cache_prompt": spelling("--cache-prompt", env="LLAMA_ARG_CACHE_PROMPT"),
        "escape": spelling("-e", "--escape"),
    },
    SamplingParams: {
        "temperature": spelling("--temp", "--temperature", env="LLAMA_ARG_TEMPERATURE"),
        "dynatemp_range": spelling("--dynatemp-range"),
        "dynatemp_exponent": spelling("--dynatemp-exp"),
        "top_k": spelling("--top-k", env="LLAMA_ARG_TOP_K"),
        "top_p": spelling("--top-p", env="LLAMA_ARG_TOP_P"),
        "min_p": spelling("--min-p", env="LLAMA_ARG_MIN_P"),
        "typical_p": spelling("--typical", "--typical-p"),
        "repeat_penalty": spelling("--repeat-penalty", env="LLAMA_ARG_REPEAT_PENALTY"),
        "repeat_last_n": spelling("--repeat-last-n"),
        "presence_penalty": spelling("--presence-penalty", env="LLAMA_ARG_PRESENCE_PENALTY"),
        "frequency_penalty": spelling("--frequency-penalty", env="LLAMA_ARG_FREQUENCY_PENALTY"),
        "dry_multiplier": spelling("--dry-multiplier"),
        "dry_base": spelling("--dry-base"),
        "dry_allowed_length": spelling("--dry-allowed-length"),
        "dry_penalty_last_n": spelling("--dry-penalty-last-n"),
        "dry_sequence_breakers": spelling("--dry-sequence-breaker"),
        "xtc_probability": spelling("--xtc-probability"),
        "xtc_threshold": spelling("--xtc-threshold"),
        "top_n_sigma": spelling("--top-nsigma", "--top-n-sigma"),
        "mirostat": spelling("--mirostat"),
        "mirostat_tau": spelling("--mirostat-ent"),
        "mirostat_eta": spelling("--mirostat-lr"),
        "adaptive_target": spelling("--adaptive-target"),
        "adaptive_decay": spelling("--adaptive-decay"),
        "seed": spelling("-s", "--seed", aliases={"-1": "", "4294967295": ""}),
    },
}
