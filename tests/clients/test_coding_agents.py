"""Codex CLI and Claude Code, each with one small task in a folder and a home of its own, with all telemetry off.

The model is weak, so its success is not asserted: every request is answered with 200, and the agents end in order.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.api.server import Server

pytestmark = pytest.mark.timeout(1500)
AGENT_TIMEOUT_SECONDS = 1200
TASK = "Print the text of the file hello.txt in the current folder."
# Without most of the instructions and tools: the prompts are thousands of tokens otherwise.
INSTRUCTIONS = "You are a coding agent."
CODEX_CONFIG = """
model_provider = "paceline"
model_context_window = 32768
model_instructions_file = "{instructions}"
check_for_update_on_startup = false
web_search = "disabled"
include_permissions_instructions = false
[model_providers.paceline]
name = "paceline"
base_url = "{url}/v1"
wire_api = "responses"
request_max_retries = 0
stream_max_retries = 0
[analytics]
enabled = false
[otel]
exporter = "none"
[skills]
include_instructions = false
[skills.bundled]
enabled = false
[features]
apps = false
goals = false
multi_agent = false
plugins = false
skill_search = false
tool_suggest = false
unified_exec = false
view_image = false
"""
CLAUDE_ENVIRONMENT = {
    "ANTHROPIC_API_KEY": "none",
    "ANTHROPIC_MODEL": "a-model",
    "ANTHROPIC_DEFAULT_HAIKU_MODEL": "a-model",
    "API_TIMEOUT_MS": str(AGENT_TIMEOUT_SECONDS * 1000),
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "CLAUDE_CODE_MAX_OUTPUT_TOKENS": "256",
    "DISABLE_AUTOUPDATER": "1",
    "DISABLE_ERROR_REPORTING": "1",
    "DISABLE_TELEMETRY": "1",
}


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A folder with the file of the task, beside which `home` is the agent's home."""
    (tmp_path / "home").mkdir()
    folder = tmp_path / "workspace"
    folder.mkdir()
    (folder / "hello.txt").write_text("The word is heron.\n")
    return folder


def run_agent(command: Sequence[str], workspace: Path, environment: dict[str, str]) -> tuple[int, str]:
    """Returns exit code and output of an agent, which sees nothing of this process's environment but PATH."""
    clean = {"PATH": os.environ["PATH"], "HOME": str(workspace.parent / "home"), **environment}
    done = subprocess.run(
        command,
        cwd=workspace,
        env=clean,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=AGENT_TIMEOUT_SECONDS,
    )
    return done.returncode, done.stdout or done.stderr


def answered(server: Server) -> list[tuple[str, int]]:
    """Stops the server and returns the path and status of each request in its log."""
    server.signal()
    server.wait()
    found = [re.search(r" [A-Z]+ (/\S*) (\d{3}) ", line) for line in server.lines]
    return [(each[1], int(each[2])) for each in found if each]


def test_codex(packages: Path, agent_server: Server, workspace: Path) -> None:
    home = workspace.parent / "home"
    (home / "instructions.md").write_text(INSTRUCTIONS)
    config = CODEX_CONFIG.format(instructions=home / "instructions.md", url=agent_server.url)
    (home / "config.toml").write_text(config)
    codex = packages / "node_modules" / ".bin" / "codex"
    # The name selects the tools: for this model Codex sends `apply_patch` as a custom tool with a grammar.
    command = [str(codex), "exec", "--json", "--skip-git-repo-check", "-s", "read-only", "-m", "gpt-5.5", TASK]
    code, output = run_agent(command, workspace, {"CODEX_HOME": str(home)})
    events = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert (code, events[-1]["type"]) == (0, "turn.completed"), output
    assert events[-1]["usage"]["output_tokens"] > 0
    requests = answered(agent_server)
    assert set(requests) == {("/v1/responses", 200)}


def test_claude_code(packages: Path, agent_server: Server, workspace: Path) -> None:
    wrapper = packages / "node_modules" / "@anthropic-ai" / "claude-code" / "cli-wrapper.cjs"
    command = ["node", str(wrapper), "-p", TASK, "--tools", "Read", "--allowedTools", "Read", "--max-turns", "3"]
    command += ["--system-prompt", INSTRUCTIONS, "--strict-mcp-config", "--output-format", "json"]
    environment = {"ANTHROPIC_BASE_URL": agent_server.url, **CLAUDE_ENVIRONMENT}
    _, output = run_agent(command, workspace, environment)
    result = json.loads(output)
    assert result["type"] == "result", output
    assert result["subtype"] in ("success", "error_max_turns"), output
    assert result["usage"]["output_tokens"] > 0
    requests = answered(agent_server)
    assert {path for path, _ in requests} <= {"/v1/messages", "/v1/messages/count_tokens"}
    assert {status for _, status in requests} == {200}
