"""How models write reasoning and calls of tools: a reader and a grammar for each format, and which one a model has."""

from __future__ import annotations

from api.tools.formats.base import Calls, Format, Parser, Rules, Tool
from api.tools.formats.deepseek import DeepSeek, DeepSeekBlock
from api.tools.formats.deltas import Arguments, Begun, Content, Delta, Reasoning
from api.tools.formats.dsml import Dsml
from api.tools.formats.gemma import FunctionGemma, Gemma
from api.tools.formats.glm import Glm
from api.tools.formats.harmony import Harmony
from api.tools.formats.hermes import Generic, Hermes, described
from api.tools.formats.kimi import Kimi
from api.tools.formats.kimi_xtml import KimiXtml
from api.tools.formats.lark import Lark
from api.tools.formats.llama import Llama, Pythonic
from api.tools.formats.mistral import Mistral, MistralList
from api.tools.formats.qwen_xml import QwenXml

__all__ = [
    "FORMATS",
    "Arguments",
    "Begun",
    "Calls",
    "Content",
    "Delta",
    "Format",
    "Generic",
    "Lark",
    "Parser",
    "Reasoning",
    "Rules",
    "Tool",
    "described",
    "format_of",
]

FORMATS: tuple[Format, ...] = (
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
"""In the order in which they are asked: the first whose sign a template has is its format."""


def format_of(template: str | None) -> Format:
    """The format of the models that a chat template is for.

    >>> format_of("... <tool_call> ...").name, format_of(None).name
    ('hermes', 'generic')
    """
    return next(format for format in FORMATS if format.fits(template or ""))
