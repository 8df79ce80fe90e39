"""llama-server's flags for well-known models: each sets other flags, which the command line can override."""

from __future__ import annotations

from collections.abc import Mapping

_FIM = {"server.port": "8012", "batch.rows": "1024", "batch.ubatch": "1024", "memory.reuse": "256"}
_FIM_DRAFT = {"hub.draft_repo": "ggml-org/Qwen2.5-Coder-0.5B-Q8_0-GGUF", "draft.path": "qwen2.5-coder-0.5b-q8_0.gguf"}
_GPT_OSS = {
    "server.port": "8013",
    "batch.rows": "32768",
    "batch.ubatch": "2048",
    "batch.slots": "2",
    "batch.context": "262144",
    "sampling.temperature": "1",
    "sampling.top_p": "1",
    "sampling.top_k": "0",
    "sampling.min_p": "0.01",
}


def _coder(size: str, family: str = "Qwen2.5-Coder", kind: str = "") -> dict[str, str]:
    name = f"{family}-{size}{kind}-Q8_0"
    return {"hub.repo": f"ggml-org/{name}-GGUF", "hub.file": f"{name.lower()}.gguf", **_FIM}


# Text of each value by its table and field, as on the command line.
SHORTCUTS: Mapping[str, Mapping[str, str]] = {
    "--embd-gemma-default": {
        "hub.repo": "ggml-org/embeddinggemma-300M-qat-q4_0-GGUF",
        "hub.file": "embeddinggemma-300M-qat-Q4_0.gguf",
        "server.port": "8011",
        "batch.rows": "2048",
        "batch.ubatch": "2048",
        "batch.slots": "32",
        "batch.context": "65536",
        "embedding.on": "true",
    },
    "--fim-qwen-1.5b-default": _coder("1.5B"),
    "--fim-qwen-3b-default": _coder("3B"),
    "--fim-qwen-7b-default": _coder("7B"),
    "--fim-qwen-7b-spec": {**_coder("7B"), **_FIM_DRAFT},
    "--fim-qwen-14b-spec": {**_coder("14B"), **_FIM_DRAFT},
    "--fim-qwen-30b-default": _coder("30B-A3B", "Qwen3-Coder", "-Instruct"),
    "--gpt-oss-20b-default": {
        "hub.repo": "ggml-org/gpt-oss-20b-GGUF",
        "hub.file": "gpt-oss-20b-mxfp4.gguf",
        **_GPT_OSS,
    },
    "--gpt-oss-120b-default": {"hub.repo": "ggml-org/gpt-oss-120b-GGUF", **_GPT_OSS},
    "--vision-gemma-4b-default": {"hub.repo": "ggml-org/gemma-3-4b-it-qat-GGUF", "server.port": "8014"},
    "--vision-gemma-12b-default": {"hub.repo": "ggml-org/gemma-3-12b-it-qat-GGUF", "server.port": "8014"},
}
