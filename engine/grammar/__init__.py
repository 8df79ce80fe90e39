"""Structured output by llguidance: compiles grammar specs, and computes the tokens that a grammar permits at each row.

spec       grammar specs and errors
pointer    JSON pointers and `$ref`
schema     JSON schemas: limits, `oneOf`, and the search for the keyword that causes an error
relax      the part of a JSON schema that a grammar enforces
gbnf       conversion of GBNF, llama.cpp's grammars, to Lark
tokenizer  a model's vocabulary for llguidance
matcher    the state of one output in its grammar
masks      the token masks of all rows of a step
jobs       worker threads with time limits
compiler   compiles specs to grammars off the event loop, and caches the grammars
"""

from engine.grammar.compiler import MAX_GRAMMAR_BYTES, Grammar, GrammarCompiler
from engine.grammar.jobs import CompilerClosed
from engine.grammar.masks import MaskRequest, Masks, RowMasks
from engine.grammar.matcher import Matcher
from engine.grammar.pointer import resolve_reference
from engine.grammar.relax import RelaxedSchema, drop_keyword, relax_schema
from engine.grammar.schema import JSON_TYPES, MAX_SCHEMA_DEPTH, unknown_types
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
    "JSON_TYPES",
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
    "RelaxedSchema",
    "RowMasks",
    "drop_keyword",
    "relax_schema",
    "resolve_reference",
    "unknown_types",
]
