"""Flags of llama-server and ik_llama.cpp that are refused, each with a sentence that names a replacement."""

from __future__ import annotations

from api.config.other_flags import refused

_SEVERAL_MODELS = "one server serves one model: put llama-swap in front of several servers"
_TOOLS = "no tools run in the server: let the client run the tools that the model calls"
_FILES = "no files are served: put a web server such as Caddy in front"
_SYNTHETIC = "drafts are never accepted at random: measure with --sim --sim-accept"
_GROUP = "self-extend is gone from llama.cpp: use --rope-scaling yarn, or --context-shift"
_OFF = ("", "0", "false", "off", "disabled")

REFUSED = (
    refused("--path", _FILES, 1, "LLAMA_ARG_STATIC_PATH", ("",)),
    refused("--ui-mcp-proxy --webui-mcp-proxy", _TOOLS, env="LLAMA_ARG_UI_MCP_PROXY"),
    refused("--tools", _TOOLS, 1, "LLAMA_ARG_TOOLS", _OFF),
    refused("--tools-runtime", _TOOLS, 1, "LLAMA_ARG_TOOLS_RUNTIME", _OFF),
    refused("--mcp-servers-config", _TOOLS, 1, "LLAMA_ARG_MCP_SERVERS_CONFIG", _OFF),
    refused("--mcp-servers-json", _TOOLS, 1, "LLAMA_ARG_MCP_SERVERS_JSON", _OFF),
    refused("-ag --agent", _TOOLS, env="LLAMA_ARG_AGENT"),
    refused(
        "-dr --docker-repo",
        "container registries are not read: name the model's repository with -hf, or its URL with -mu",
        1,
        "LLAMA_ARG_DOCKER_REPO",
        ("",),
    ),
    refused("--models-dir", _SEVERAL_MODELS, 1, "LLAMA_ARG_MODELS_DIR", ("",)),
    refused("--models-max", _SEVERAL_MODELS, 1, "LLAMA_ARG_MODELS_MAX", ("1",)),
    refused("--spec-synth-len", _SYNTHETIC, 1, "LLAMA_ARG_SPEC_SYNTH_LEN"),
    refused("--spec-synth-rates", _SYNTHETIC, 1, "LLAMA_ARG_SPEC_SYNTH_RATES"),
    refused(
        "--sleep-idle-seconds",
        "a loaded model stays in memory: let llama-swap stop and start the server (its ttl)",
        1,
        harmless=("-1",),
    ),
    refused("--log-prompts-dir", "prompts are not written to files: -v adds them to replies as __verbose", 1),
    # Flags of earlier versions.
    refused("-gan --grp-attn-n -gaw --grp-attn-w", _GROUP, 1),
    refused("-spf --system-prompt-file", "prompts are sent by clients: use a system message", 1),
    refused("-mtp --multi-token-prediction", "use --spec-type draft-mtp, or auto, which includes it"),
    # ik_llama.cpp
    refused("-ser --smart-expert-reduction", "all experts of the model are used: --override-kv sets another number", 1),
    refused("-draft --draft-params", "name each setting of the draft model: -ngld, -ctkd, -ctvd, -cd, -td", 1),
    refused("--banned-string-file", "strings are banned by request: use logit_bias", 1),
    refused("--banned-n", "strings are banned by request: use logit_bias", 1),
    refused("--dry-run", "paceline cost -m FILE loads the model, measures it and exits"),
    refused("-no-fa --no-fa --no-flash-attn", "use -fa off"),
)
