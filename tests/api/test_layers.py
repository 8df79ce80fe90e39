"""Imports inside api point to lower layers only, and api imports only public names of the engine."""

from __future__ import annotations

import pytest

from tests.engine.test_layers import ROOT, imports, upward

API = """
http
config
hub
schema
tools
templates
generation
anthropic openai llama_server ui
server
commands ray_serve
__main__
"""
HTTP = """
body_writer decode_errors events tasks request_body response_counts
error_responses
dialects key_ring
request_context
responses
api_keys content_type disconnect origins prefix
connection_limit
"""
CONFIG = """
server hub generation samplers other_flags shortcuts spelling
options generation_spellings without_effect refused
spellings
flags
values
arguments config_file keys request_defaults
presets
command_line
"""
HUB = """
errors gguf_names
download
repository
url
cache resolve
"""
SCHEMA = """
logit_bias speculation speculation_stats token_origins value_size
generation_settings replies
logprobs samplers request_values
completion_replies requests
unsupported
"""
TOOLS = "formats\ntool_choice"
FORMATS = """
deltas text_buffer lark_builder
base
tagged values stop_ranges
json_calls arguments gemma_grammar
deepseek dsml gemma glm harmony hermes kimi kimi_xtml llama mistral qwen_xml
"""
TEMPLATES = "builtin media_urls\nchat_template media_files\nchat_messages tool_messages\ntext_tokens\nprompts\ninfill"
GENERATION = """
loaded_model json_validation
schema_checks
constraints embedding completion_output enforced_calls
request_limits prepared_chat
choices
openai_replies chat_choices
"""
ANTHROPIC = "client_tools messages_schema errors\nblocks conversation\nconversion\nmessages"
OPENAI = "messages\nchat completions embeddings\nrender\nresponses"
RESPONSES = """
encoded_reasoning request
reply
tools
conversation output input_items
chat_form store
run
endpoint
"""
LLAMA_SERVER = "completion_schema\ncompletion lora props rerank slots tokenize\ninfill"
UI = "page snapshot\nevents"
SERVER = """
connections logs metric_families access_metrics
http_protocol vllm_metrics predict terminal tracing kv_events
metrics router_info
status
operations
openapi
app
lifecycle
"""
COMMANDS = """
server_client
chat_session own_server top_sample
top_view chat
cost doctor flags lookup models top
printing
"""


@pytest.mark.parametrize(
    ("package", "layers"),
    [
        ("api", API),
        ("api.http", HTTP),
        ("api.config", CONFIG),
        ("api.hub", HUB),
        ("api.schema", SCHEMA),
        ("api.tools", TOOLS),
        ("api.tools.formats", FORMATS),
        ("api.templates", TEMPLATES),
        ("api.generation", GENERATION),
        ("api.anthropic", ANTHROPIC),
        ("api.openai", OPENAI),
        ("api.openai.responses", RESPONSES),
        ("api.llama_server", LLAMA_SERVER),
        ("api.ui", UI),
        ("api.server", SERVER),
        ("api.commands", COMMANDS),
    ],
)
def test_imports_point_down(package: str, layers: str) -> None:
    assert upward(package, layers) == []


def test_only_public_names_of_the_engine() -> None:
    used = {
        (path.stem, name)
        for path in (ROOT / "api").rglob("*.py")
        for name in imports(path)
        if name.startswith("engine.") and name.count(".") > 1
    }
    assert used == set()
