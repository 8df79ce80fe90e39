"""Imports inside api point to lower layers only, and api imports only public names of the engine."""

from __future__ import annotations

import pytest

from tests.engine.test_layers import ROOT, imports, upward

API = """
http
config
schema
tools
templates
generation
openai llama_server
server
commands
__main__
"""
HTTP = "decode_errors events tasks request_body\nerror_responses request_context\nresponses\napi_keys"
CONFIG = "server\noptions spellings\nflags\ncommand_line"
SCHEMA = "requests speculation speculation_stats\nreplies\nlogprobs"
TOOLS = "formats\ntool_choice"
FORMATS = """
deltas text_buffer lark_builder
base
tagged values
json_calls arguments gemma_grammar
deepseek dsml gemma glm harmony hermes kimi kimi_xtml llama mistral qwen_xml
"""
TEMPLATES = "builtin\nchat_template\ntool_messages\nprompts"
GENERATION = "loaded_model\nconstraints choices\nprepared_chat"
OPENAI = "messages\nchat completions\nrender"
LLAMA_SERVER = "generation_settings\ncompletion_schema\ncompletion props slots tokenize"
SERVER = "metrics terminal\napp\nlifecycle"
COMMANDS = "cost flags lookup"


@pytest.mark.parametrize(
    ("package", "layers"),
    [
        ("api", API),
        ("api.http", HTTP),
        ("api.config", CONFIG),
        ("api.schema", SCHEMA),
        ("api.tools", TOOLS),
        ("api.tools.formats", FORMATS),
        ("api.templates", TEMPLATES),
        ("api.generation", GENERATION),
        ("api.openai", OPENAI),
        ("api.llama_server", LLAMA_SERVER),
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
