"""What a client says the text must look like, in whichever of four dialects: OpenAI's, llama-server's, vLLM's two."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec

from api.generation.loaded_model import Core
from api.schema.requests import Completion, ResponseFormat, StructuredOutputs
from engine import Choice, Form, Gbnf, Grammar, JsonObject, JsonSchema, Lark, Regex, RequestRefused

FORMATS = ("text", "json_object", "json_schema")
_LARK = re.compile(r"^[^\S\n]*(%llguidance\b|start\s*:(?!:=))", re.MULTILINE)  # a line at a time: in linear time


class Constraint(NamedTuple):
    """A form, and the field that asks for it."""

    form: Form
    path: str


def constraint_of(asked: Completion) -> Constraint | None:
    """What the text must look like; None if that is up to the model. Raises RequestRefused for more than one form."""
    found = list(_found(asked))
    if len(found) > 1:
        raise RequestRefused(
            f"{found[0].path} and {found[1].path} exclude each other: a text has one form.", field=found[1].path
        )
    return found[0] if found else None


async def grammar_of(engine: Core, constraint: Constraint | None) -> Grammar | None:
    """The constraint as the engine takes it. Raises RequestRefused, with the field and, of a schema, the JSON pointer
    of the keyword that cannot be followed."""
    if constraint is None:
        return None
    try:
        return await engine.compile(constraint.form)
    except RequestRefused as error:
        error.field = constraint.path + (error.field or "")
        raise


def _found(asked: Completion) -> Iterator[Constraint]:
    if asked.response_format is not None:
        yield from _of_format(asked.response_format)
    if asked.grammar:
        yield Constraint(_grammar(asked.grammar), "grammar")
    if asked.json_schema is not None:
        yield Constraint(_schema(asked.json_schema), "json_schema")
    if asked.structured_outputs is not None:
        yield from _of_outputs(asked.structured_outputs)
    guided = StructuredOutputs(asked.guided_json, None, asked.guided_regex, asked.guided_choice, asked.guided_grammar)
    yield from _of_outputs(guided, "guided_")


def _of_format(asked: ResponseFormat) -> Iterator[Constraint]:
    match asked.type:
        case "text":
            return
        case "json_object" if asked.schema is not None:
            yield Constraint(_schema(asked.schema), "response_format.schema")
        case "json_object":
            yield Constraint(JsonObject(), "response_format")
        case "json_schema":
            if asked.json_schema is None:
                raise RequestRefused(
                    "response_format of type 'json_schema' needs json_schema with a schema.",
                    field="response_format.json_schema",
                )
            yield Constraint(_schema(asked.json_schema.schema), "response_format.json_schema.schema")
        case other:
            known = ", ".join(FORMATS)
            raise RequestRefused(
                f"response_format {other[:64]!r} is not supported, only {known}.", field="response_format.type"
            )


def _of_outputs(asked: StructuredOutputs, prefix: str = "structured_outputs.") -> Iterator[Constraint]:
    if asked.json is not None:
        yield Constraint(_schema(asked.json), f"{prefix}json")
    if asked.json_object:
        yield Constraint(JsonObject(), f"{prefix}json_object")
    if asked.regex is not None:
        yield Constraint(Regex(asked.regex), f"{prefix}regex")
    if asked.choice is not None:
        yield Constraint(Choice(tuple(asked.choice)), f"{prefix}choice")
    if asked.grammar:
        yield Constraint(_grammar(asked.grammar), f"{prefix}grammar")


def _schema(schema: dict[str, Any] | str) -> JsonSchema:
    """A schema, which vLLM's clients may send as text."""
    return JsonSchema(schema.encode() if isinstance(schema, str) else msgspec.json.encode(schema))


def _grammar(text: str) -> Form:
    """GBNF, or Lark if it says so or has a `start` rule."""
    return Lark(text) if _LARK.search(text) else Gbnf(text)
