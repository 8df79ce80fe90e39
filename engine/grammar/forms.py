"""What a continuation may be made to look like, as values."""

from __future__ import annotations

from msgspec import Struct


class GrammarError(Exception):
    """A form that cannot be used, or a text that cannot go on in it; `pointer` is the JSON pointer of the keyword of
    a schema that is to blame, if one is."""

    def __init__(self, message: str, pointer: str | None = None) -> None:
        super().__init__(message)
        self.pointer = pointer


class TooSlow(GrammarError):
    """A form whose grammar takes too long to make, maybe only as others are made."""


class JsonSchema(Struct, frozen=True, tag=True):
    """JSON that a schema describes. Properties come in the schema's order."""

    schema: bytes
    """The schema as JSON in UTF-8."""


class JsonObject(Struct, frozen=True, tag=True):
    """Any JSON object."""


class Regex(Struct, frozen=True, tag=True):
    """A text that a regular expression matches whole, in the syntax of Rust's `regex`."""

    pattern: str


class Choice(Struct, frozen=True, tag=True):
    """One of several texts."""

    texts: tuple[str, ...]


class Gbnf(Struct, frozen=True, tag=True):
    """What llama.cpp's grammars describe; `root` is where they start."""

    text: str


class Lark(Struct, frozen=True, tag=True):
    """What a grammar in llguidance's dialect of Lark describes; `start` is where it starts. It may hold JSON schemas
    (`%json {...}`) and name special tokens (`<|im_end|>`, or `<[17]>` by number)."""

    text: str


Form = JsonSchema | JsonObject | Regex | Choice | Gbnf | Lark
