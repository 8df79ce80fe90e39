"""The AI SDK with three providers, and OpenAI's SDK: streams, loops with two tools and structured output."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.api.server import Server

pytestmark = pytest.mark.timeout(900)


def run_script(packages: Path, script: str, *arguments: str) -> Any:
    """Returns the JSON that a script prints."""
    command = ["node", script, *arguments]
    done = subprocess.run(command, cwd=packages, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("provider", ["openai", "openai-compatible", "anthropic"])
def test_the_ai_sdk(packages: Path, chat_server: Server, provider: str) -> None:
    results = run_script(packages, "ai_sdk.mjs", provider, chat_server.url, "a-model")
    stream = results["stream"]
    assert (stream["finish"], stream["parts"].count("text-delta") > 2) == ("stop", True)
    assert stream["text"]
    assert stream["usage"]["outputTokens"] > 2
    for name in ("loop", "streamed_loop"):
        assert results[name]["called"] == [["temperature", {"city": "Bern"}], ["add", {"a": 7, "b": 2}]]
        assert results[name]["steps"] == ["tool-calls", "tool-calls", "stop"]
    for answer in results["structured"].values():
        assert (answer["name"], answer["temperature"]) == ("Bern", 7)


def test_the_openai_sdk(packages: Path, chat_server: Server) -> None:
    results = run_script(packages, "openai_sdk.mjs", chat_server.url, "a-model")
    chat = results["chat_stream"]
    assert chat["deltas"] == chat["text"] != ""
    assert chat["tokens"] > 2
    assert {name for name, _ in results["tool_loop"]["called"]} == {"temperature", "sum"}
    assert results["tool_loop"]["roles"].count("tool") >= 2
    assert results["parsed"] == {name: {"name": "Bern", "temperature": 7} for name in ("chat", "response")}
    response = results["response_stream"]
    assert response["text"]
    assert {"response.created", "response.output_text.delta", "response.completed"} <= set(response["types"])
    custom = results["custom_tool"]
    assert custom["deltas"] == custom["input"]
    assert custom["input"].startswith("ls ")
    assert custom["status"] in ("completed", "incomplete")
