"""Chat formats: the notations of reasoning and tool calls by model family, each with a parser and a grammar."""

from __future__ import annotations

from api.tools.formats.base import AllowedCalls, ChatFormat, MessageConstraints, MessageParser, Tool
from api.tools.formats.deepseek import DeepSeek, DeepSeekBlock
from api.tools.formats.deltas import ArgumentsDelta, ContentDelta, MessageDelta, ReasoningDelta, ToolCallStart
from api.tools.formats.dsml import Dsml
from api.tools.formats.gemma import FunctionGemma, Gemma
from api.tools.formats.glm import Glm
from api.tools.formats.harmony import Harmony
from api.tools.formats.hermes import Generic, Hermes, tool_instructions
from api.tools.formats.kimi import Kimi
from api.tools.formats.kimi_xtml import KimiXtml
from api.tools.formats.lark_builder import LarkBuilder
from api.tools.formats.llama import Llama, Pythonic
from api.tools.formats.mistral import Mistral, MistralList
from api.tools.formats.qwen_xml import QwenXml
from api.tools.formats.stop_ranges import StopRanges
from api.tools.formats.values import UnsupportedNotation

__all__ = [
    "CHAT_FORMATS",
    "AllowedCalls",
    "ArgumentsDelta",
    "ChatFormat",
    "ContentDelta",
    "Generic",
    "LarkBuilder",
    "MessageConstraints",
    "MessageDelta",
    "MessageParser",
    "ReasoningDelta",
    "StopRanges",
    "Tool",
    "ToolCallStart",
    "UnsupportedNotation",
    "format_of",
    "tool_instructions",
]

# Order of detection: the first format that matches a template is the template's format.
CHAT_FORMATS: tuple[ChatFormat, ...] = (
    Harmony(),
    KimiXtml(),
    Kimi(),
    Dsml(),
    DeepSeekBlock(),
    DeepSeek(),
    Gemma(),
    FunctionGemma(),
    Glm(),
    QwenXml(),
    Hermes(),
    Mistral(),
    MistralList(),
    Pythonic(),
    Llama(),
    Generic(),
)


def format_of(template: str | None) -> ChatFormat:
    """Returns the format of models with the chat template `template`. Without a template the format is `Generic`.

    >>> format_of("... <tool_call> ...").name, format_of(None).name
    ('hermes', 'generic')
    """
    return next(format for format in CHAT_FORMATS if format.matches(template or ""))
