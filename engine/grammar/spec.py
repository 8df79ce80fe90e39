"""Grammar specs: the formats that structured output can be requested in, as values."""

from __future__ import annotations

from msgspec import Struct


class GrammarError(Exception):
    """A spec that cannot be compiled, or a grammar that an output cannot follow further.

    `pointer` is the JSON pointer of the schema keyword that causes the error; None if no keyword was found, or if the
    spec is no schema.
    """

    def __init__(self, message: str, pointer: str | None = None) -> None:
        super().__init__(message)
        self.pointer = pointer


class CompileTimeout(GrammarError):
    """A spec that was not compiled in time; the cause may be the queue rather than the spec."""


class JsonSchema(Struct, frozen=True, tag=True):
    """JSON that a schema describes. Properties are emitted in the schema's order."""

    schema: bytes
    """The schema as JSON in UTF-8."""


class JsonObject(Struct, frozen=True, tag=True):
    """Any JSON object."""


class Regex(Struct, frozen=True, tag=True):
    """An output that a regular expression matches as a whole, in the syntax of Rust's `regex`."""

    pattern: str


class OneOfTexts(Struct, frozen=True, tag=True):
    """One of several texts (vLLM: `choice`)."""

    texts: tuple[str, ...]


class Gbnf(Struct, frozen=True, tag=True):
    """A grammar of llama.cpp; its start rule is `root`."""

    text: str


class Lark(Struct, frozen=True, tag=True):
    """A grammar in llguidance's dialect of Lark; its start rule is `start`.

    It can contain JSON schemas (`%json {...}`) and special tokens by name (`<|im_end|>`) or by id (`<[17]>`).
    """

    text: str


GrammarSpec = JsonSchema | JsonObject | Regex | OneOfTexts | Gbnf | Lark
