"""How models write reasoning and calls of tools: a reader and a grammar for each format, and which one a model has."""

from __future__ import annotations

from api.formats.base import Calls, Format, Parser, Rules, Tool
from api.formats.deepseek import DeepSeek, DeepSeekBlock
from api.formats.deltas import Arguments, Begun, Content, Delta, Reasoning
from api.formats.dsml import Dsml
from api.formats.gemma import FunctionGemma, Gemma
from api.formats.glm import Glm
from api.formats.harmony import Harmony
from api.formats.hermes import Generic, Hermes, described
from api.formats.kimi import Kimi
from api.formats.kimi_xtml import KimiXtml
from api.formats.lark import Lark
from api.formats.llama import Llama, Pythonic
from api.formats.mistral import Mistral, MistralList
from api.formats.qwen_xml import QwenXml

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
