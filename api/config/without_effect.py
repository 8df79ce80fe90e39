"""Flags of llama-server and ik_llama.cpp that are accepted without effect."""

from __future__ import annotations

from api.config.other_flags import without_effect

_BATCHING = "requests are always batched continuously"
_JINJA = "chat templates are always rendered with Jinja"
_METRICS = "GET /metrics is always served"
_PAGE = "the page keeps its settings in the browser"
_NO_VIDEO = "videos are not served"
_NO_TOOLS = "no tools run in the server"
_SAMPLER = "the draft model's tokens are sampled with the target model's noise (--draft-noise)"
_SLOT = "a request gets the slot with the longest cached prefix"
_ONE_MODEL = "one model is served"
_REPACK = "weights are repacked where that is faster (--no-repack disables it)"
_GRAPH = "llama.cpp builds the graph for its devices"
_DRAFT_THREADS = "the threads of the target model compute the draft model"
_CHECKPOINTS = "the prefix cache keeps states by its own rule (--cache-ram, --cache-disk)"
_MLA = "llama.cpp chooses the attention of the model"

WITHOUT_EFFECT = (
    without_effect("-cb --cont-batching -nocb --no-cont-batching", _BATCHING, env="LLAMA_ARG_CONT_BATCHING"),
    without_effect("--jinja --no-jinja", _JINJA, env="LLAMA_ARG_JINJA"),
    without_effect("--metrics", _METRICS, env="LLAMA_ARG_ENDPOINT_METRICS"),
    without_effect("--ui-config --webui-config", _PAGE, 1, "LLAMA_ARG_UI_CONFIG"),
    without_effect("--ui-config-file --webui-config-file", _PAGE, 1, "LLAMA_ARG_UI_CONFIG_FILE"),
    without_effect("--no-ui-mcp-proxy --no-webui-mcp-proxy", _NO_TOOLS),
    without_effect("-no-ag --no-agent", _NO_TOOLS),
    without_effect("-mmdev --mmproj-device", "llama.cpp chooses the GPU of the projector", 1, "MTMD_BACKEND_DEVICE"),
    without_effect("--mtmd-batch-max-tokens", "images are encoded one by one", 1, "LLAMA_ARG_MTMD_BATCH_MAX_TOKENS"),
    without_effect("--video-fps", _NO_VIDEO, 1, "LLAMA_ARG_VIDEO_FPS"),
    without_effect("--video-timestamp-interval", _NO_VIDEO, 1, "LLAMA_ARG_VIDEO_TIMESTAMP_INTERVAL"),
    without_effect("--video-ffmpeg-dir", _NO_VIDEO, 1, "LLAMA_ARG_VIDEO_FFMPEG_DIR"),
    without_effect("--models-autoload --no-models-autoload", _ONE_MODEL, env="LLAMA_ARG_MODELS_AUTOLOAD"),
    without_effect("-sps --slot-prompt-similarity", _SLOT, 1),
    without_effect("--threads-http", "one event loop serves all connections", 1, "LLAMA_ARG_THREADS_HTTP"),
    without_effect("--cache-idle-slots --no-cache-idle-slots", _SLOT, env="LLAMA_ARG_CACHE_IDLE_SLOTS"),
    without_effect("--spec-draft-p-split --draft-p-split -ps --p-split", _SAMPLER, 1, "LLAMA_ARG_SPEC_DRAFT_P_SPLIT"),
    without_effect("--spec-draft-sampling", _SAMPLER, 1),
    without_effect(
        "--spec-draft-backend-sampling --no-spec-draft-backend-sampling",
        _SAMPLER,
        env="LLAMA_ARG_SPEC_DRAFT_BACKEND_SAMPLING",
    ),
    without_effect("--spec-ngram-check-rate", "n-grams are looked up for every token", 1),
    without_effect("--prio-batch", "--prio holds for all steps", 1),
    without_effect("--spec-draft-cpu-mask -Cd --cpu-mask-draft", _DRAFT_THREADS, 1),
    without_effect("--spec-draft-cpu-range -Crd --cpu-range-draft", _DRAFT_THREADS, 1),
    without_effect("--spec-draft-cpu-strict --cpu-strict-draft", _DRAFT_THREADS, 1),
    without_effect("--spec-draft-prio --prio-draft", _DRAFT_THREADS, 1),
    without_effect("--spec-draft-poll --poll-draft", _DRAFT_THREADS, 1),
    without_effect("--spec-draft-cpu-mask-batch -Cbd --cpu-mask-batch-draft", _DRAFT_THREADS, 1),
    without_effect("--spec-draft-cpu-strict-batch --cpu-strict-batch-draft", _DRAFT_THREADS, 1),
    without_effect("--spec-draft-prio-batch --prio-batch-draft", _DRAFT_THREADS, 1),
    without_effect("--spec-draft-poll-batch --poll-batch-draft", _DRAFT_THREADS, 1),
    without_effect("--perf --no-perf", "times are always measured", env="LLAMA_ARG_PERF"),
    without_effect("-dt --defrag-thold", "cells are defragmented when that pays", 1, "LLAMA_ARG_DEFRAG_THOLD"),
    without_effect("-ctxcp --ctx-checkpoints --swa-checkpoints", _CHECKPOINTS, 1, "LLAMA_ARG_CTX_CHECKPOINTS"),
    without_effect("-cms --checkpoint-min-step", _CHECKPOINTS, 1, "LLAMA_ARG_CHECKPOINT_MIN_SPACING_NT"),
    without_effect("-dkvc --dump-kv-cache", "GET /slots lists what the KV cache holds"),
    without_effect("--verbose-prompt", "-v adds the prompt to replies"),
    without_effect("--display-prompt --no-display-prompt --simple-io", "nothing is printed to the terminal"),
    # ik_llama.cpp
    without_effect("-rtr --run-time-repack", _REPACK),
    without_effect("-fmoe --fused-moe -no-fmoe --no-fmoe --no-fused-moe", _GRAPH),
    without_effect("-no-fug --no-fug --no-fused-up-gate -no-mmad --no-mmad --no-fused-mul-multiadd", _GRAPH),
    without_effect("-ger --grouped-expert-routing -gr --graph-reuse -no-gr --no-gr --no-graph-reuse", _GRAPH),
    without_effect("-mqkv --merge-qkv -muge --merge-up-gate-experts -rcache --rope-cache", _GRAPH),
    without_effect("-sas --scheduler-async -smgs --split-mode-graph-scheduling", _GRAPH),
    without_effect("-smf16 --split-mode-f16 -smf32 --split-mode-f32", _GRAPH),
    without_effect("-grt --graph-reduce-type -cuda --cuda-params --max-gpu -mea --max-extra-alloc", _GRAPH, 1),
    without_effect("-ooae --offload-only-active-experts -no-ooae --no-offload-only-active-experts", _GRAPH),
    without_effect("-op --offload-policy", "--no-op-offload keeps operations on the CPU", 1),
    without_effect("-mla --mla-use", _MLA, 1),
    without_effect("-amb --attention-max-batch", _MLA, 1),
    without_effect("-khad --k-cache-hadamard -vhad --v-cache-hadamard", _MLA),
    without_effect("-thp --transparent-huge-pages", "the kernel decides on huge pages"),
    without_effect("-vq --validate-quants", "--check-tensors checks the weights"),
    without_effect("-crs --cache-ram-similarity -cram-n-min --cache-ram-n-min", _SLOT, 1),
    without_effect("--reasoning-tokens", _SLOT, 1),
)
