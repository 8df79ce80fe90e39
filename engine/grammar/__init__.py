"""Structured output: what a text must look like, and which tokens that leaves at every row. By llguidance.

forms      what may be asked for, and what is wrong with it
schema     JSON schemas: how deep, and which keyword is to blame
gbnf       llama.cpp's grammars as Lark
bridge     a model's tokens as llguidance wants to know them
matcher    where one text is in its grammar
masks      the tokens permitted at all rows of a step
jobs       what is done on threads of its own, and given up when it takes too long
compiler   from forms to grammars: off the event loop, with limits, kept for the next time
"""

from engine.grammar.compiler import SIZE, Grammar, Grammars
from engine.grammar.forms import Choice, Form, Gbnf, GrammarError, JsonObject, JsonSchema, Lark, Regex, TooSlow
from engine.grammar.jobs import Closed
from engine.grammar.masks import Masks, Permits, Want
from engine.grammar.matcher import Matcher
from engine.grammar.schema import DEPTH

__all__ = [
    "DEPTH",
    "SIZE",
    "Choice",
    "Closed",
    "Form",
    "Gbnf",
    "Grammar",
    "GrammarError",
    "Grammars",
    "JsonObject",
    "JsonSchema",
    "Lark",
    "Masks",
    "Matcher",
    "Permits",
    "Regex",
    "TooSlow",
    "Want",
]
