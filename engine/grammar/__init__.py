"""Structured output by llguidance: compiles grammar specs and computes the tokens that a grammar permits at each row.

spec       what a request may ask for, and the errors
pointer    JSON pointers and `$ref`
schema     JSON schemas: limits, and the keyword that makes a schema unusable
gbnf       llama.cpp's grammars as Lark
tokenizer  a model's vocabulary for llguidance
matcher    state of one output in its grammar
masks      token masks of all rows of a step
jobs       worker threads with time limits
compiler   specs to grammars: off the event loop, cached
"""

from engine.grammar.compiler import MAX_GRAMMAR_BYTES, Grammar, GrammarCompiler
from engine.grammar.jobs import CompilerClosed
from engine.grammar.masks import MaskRequest, Masks, RowMasks
from engine.grammar.matcher import Matcher
from engine.grammar.pointer import resolve_reference
from engine.grammar.schema import MAX_SCHEMA_DEPTH
from engine.grammar.spec import (
    CompileTimeout,
    Gbnf,
    GrammarError,
    GrammarSpec,
    JsonObject,
    JsonSchema,
    Lark,
    OneOfTexts,
    Regex,
)

__all__ = [
    "MAX_GRAMMAR_BYTES",
    "MAX_SCHEMA_DEPTH",
    "CompileTimeout",
    "CompilerClosed",
    "Gbnf",
    "Grammar",
    "GrammarCompiler",
    "GrammarError",
    "GrammarSpec",
    "JsonObject",
    "JsonSchema",
    "Lark",
    "MaskRequest",
    "Masks",
    "Matcher",
    "OneOfTexts",
    "Regex",
    "RowMasks",
    "resolve_reference",
]
