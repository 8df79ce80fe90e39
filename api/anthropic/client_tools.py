"""The tools that Anthropic defines and clients run: their names in requests stand for these schemas.

Source: Anthropic's documentation of the bash, text editor and memory tools.
"""

from __future__ import annotations

import re
from typing import Any

_TEXT = {"type": "string"}
_LINES = {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2}
_EDITS = {
    "path": _TEXT,
    "view_range": {**_LINES, "description": "The first and last line to view; -1 is the end of the file."},
    "file_text": {**_TEXT, "description": "The content for `create`."},
    "old_str": {**_TEXT, "description": "The text that `str_replace` replaces; it occurs once."},
    "new_str": {**_TEXT, "description": "The replacement for `str_replace`."},
    "insert_line": {"type": "integer", "description": "The line after which `insert` inserts."},
    "insert_text": {**_TEXT, "description": "The text for `insert`."},
}
_EDIT_COMMANDS = ("view", "create", "str_replace", "insert")
# Versions of the text editor with a command to undo edits, whose inserted text is `new_str`.
_WITH_UNDO = re.compile(r"_202(41022|50124)$")
_DEFINED_TYPE = re.compile(r"(bash|text_editor|memory)_\d{8}")


def client_tool_definition(type: str) -> dict[str, Any] | None:
    """Returns description and parameters of a tool type such as `bash_20250124`. None if the client cannot run it."""
    found = _DEFINED_TYPE.fullmatch(type)
    match found and found[1]:
        case "bash":
            return {
                "description": "Runs a command in a bash session that lasts over calls; `restart` begins a new one.",
                "parameters": _parameters({"command": _TEXT, "restart": {"type": "boolean"}}),
            }
        case "text_editor":
            return {"description": "Views and edits text files.", "parameters": _editor_parameters(type)}
        case "memory":
            commands = (*_EDIT_COMMANDS, "delete", "rename")
            properties = {
                "command": {"type": "string", "enum": [*commands]},
                **_EDITS,
                "old_path": _TEXT,
                "new_path": _TEXT,
            }
            return {
                "description": "Keeps notes for later conversations in files below /memories.",
                "parameters": _parameters(properties, "command"),
            }
    return None


def _editor_parameters(type: str) -> dict[str, Any]:
    if not _WITH_UNDO.search(type):
        return _parameters({"command": {"type": "string", "enum": [*_EDIT_COMMANDS]}, **_EDITS}, "command", "path")
    edits = {name: value for name, value in _EDITS.items() if name != "insert_text"}
    edits["new_str"] = {**_TEXT, "description": "The replacement for `str_replace`, the text for `insert`."}
    return _parameters(
        {"command": {"type": "string", "enum": [*_EDIT_COMMANDS, "undo_edit"]}, **edits}, "command", "path"
    )


def _parameters(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*required], "additionalProperties": False}
