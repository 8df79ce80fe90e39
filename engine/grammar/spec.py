"""Grammar specs: values that describe the form of a structured output."""

from __future__ import annotations

from msgspec import Struct


class GrammarError(Exception):
    """A spec cannot be compiled, or an output cannot follow its grammar further.

    `pointer` is the JSON pointer of the schema keyword that causes the error. It is None if no keyword was found, or if
    the spec is not a schema.
    """

    def __init__(self, message: str, pointer: str | None = None) -> None:
        super().__init__(message)
        self.pointer = pointer


class CompileTimeout(GrammarError):
    """A spec was not compiled in time. The cause can be a long queue instead of the spec."""


class JsonSchema(Struct, frozen=True, tag=True):
    """JSON that a schema describes. The properties of an object are emitted in the order of the schema."""

    schema: bytes
    """The schema as JSON in UTF-8."""
    strict: bool = True
    """True if a keyword that cannot be followed is an error. Otherwise the grammar enforces the other keywords, and
    `Grammar.relaxed` lists those that it does not."""


class JsonObject(Struct, frozen=True, tag=True):
    """Any JSON object."""


class Regex(Struct, frozen=True, tag=True):
    """An output that a regular expression matches as a whole. The syntax is that of Rust's `regex` crate."""

    pattern: str


class OneOfTexts(Struct, frozen=True, tag=True):
    """One of several texts (vLLM: `choice`)."""

    texts: tuple[str, ...]


class Gbnf(Struct, frozen=True, tag=True):
    """A grammar in GBNF, llama.cpp's format. Its start rule is `root`."""

    text: str


class Lark(Struct, frozen=True, tag=True):
    """A grammar in llguidance's dialect of Lark. Its start rule is `start`.

    It can contain JSON schemas (`%json {...}`) and special tokens by name (`<|im_end|>`) or by id (`<[17]>`).
    """

    text: str


GrammarSpec = JsonSchema | JsonObject | Regex | OneOfTexts | Gbnf | Lark
