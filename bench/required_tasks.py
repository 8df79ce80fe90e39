"""Small tasks that a model must answer with tool calls, each with the calls that the question asks for.

Questions for several calls are worded so that Qwen2.5-Coder 1.5B makes them: it answers most other wordings with one
call, with and without a grammar.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct


class RequiredTask(Struct, frozen=True):
    """A question and the names of the functions to call, one for each call."""

    question: str
    calls: tuple[str, ...]


def _tool(name: str, description: str, **parameters: str) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": {key: {"type": kind} for key, kind in parameters.items()},
        "required": list(parameters),
    }
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


_TOOLS = (
    _tool("calculate", "Evaluates an arithmetic expression.", expression="string"),
    _tool("get_weather", "Returns the current weather of a city.", city="string"),
    _tool("translate", "Translates a text into a language.", text="string", language="string"),
    _tool("set_timer", "Starts a timer.", minutes="integer"),
    _tool("search_files", "Finds the files whose names match a pattern.", pattern="string"),
    _tool("read_file", "Returns the content of a file.", path="string"),
    _tool("send_message", "Sends a message to a person.", recipient="string", text="string"),
)

REQUIRED_TASKS = (
    RequiredTask("What is 17*23+4? Use the tool.", ("calculate",)),
    RequiredTask("Compute 2**10 with the tool.", ("calculate",)),
    RequiredTask("How much is 15 percent of 240?", ("calculate",)),
    RequiredTask("What is the square root of 144?", ("calculate",)),
    RequiredTask("What's the weather in Oslo?", ("get_weather",)),
    RequiredTask("Is it raining in Zurich right now?", ("get_weather",)),
    RequiredTask("Translate 'good morning' into French.", ("translate",)),
    RequiredTask("How do you say 'thank you' in Japanese?", ("translate",)),
    RequiredTask("Set a timer for 10 minutes.", ("set_timer",)),
    RequiredTask("Remind me in half an hour with a timer.", ("set_timer",)),
    RequiredTask("Find all Python files.", ("search_files",)),
    RequiredTask("Which files end in .toml?", ("search_files",)),
    RequiredTask("Show me the content of README.md.", ("read_file",)),
    RequiredTask("Open src/main.py and read it.", ("read_file",)),
    RequiredTask("Tell Anna that I am late.", ("send_message",)),
    RequiredTask("Send Bob the message 'See you at 8'.", ("send_message",)),
    RequiredTask("What's the weather in Bern? And what's the weather in Oslo?", ("get_weather", "get_weather")),
    RequiredTask("Read both a.txt and b.txt.", ("read_file", "read_file")),
    RequiredTask("Compute 12*12 and also 13*13, each with a call.", ("calculate", "calculate")),
    RequiredTask(
        "Translate each of 'cat', 'dog' and 'bird' into German, with a call for each word.", ("translate",) * 3
    ),
)


def offered_tools(task: RequiredTask) -> list[dict[str, Any]]:
    """Returns the tools that the task names."""
    return [tool for tool in _TOOLS if tool["function"]["name"] in task.calls]
