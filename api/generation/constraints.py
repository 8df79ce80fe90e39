"""Output constraints of a request in the fields of OpenAI, llama-server and vLLM (current and older)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec

from api.generation.schema_checks import CompiledConstraint, SchemaCheck
from api.schema.request_values import ResponseFormat, StructuredOutputs
from api.schema.requests import GenerationRequest
from engine import (
    JSON_TYPES,
    Engine,
    Gbnf,
    GrammarSpec,
    JsonObject,
    JsonSchema,
    Lark,
    OneOfTexts,
    Regex,
    RequestRefused,
    unknown_types,
)

_RESPONSE_FORMATS = ("text", "json_object", "json_schema")

# Keywords that determine the type of a value.
_TYPE_KEYWORDS = frozenset(("type", "enum", "const", "$ref", "anyOf", "oneOf", "allOf"))

# The start of a line that is valid in Lark and not in GBNF. A match stays within one line, for a search in linear time.
_LARK_LINE = re.compile(r"^[^\S\n]*(%llguidance\b|start\s*:(?!:=))", re.MULTILINE)


class Constraint(NamedTuple):
    """The grammar of the output, and the path of the request's field that contains the grammar."""

    spec: GrammarSpec
    path: str


def parse_constraint(request: GenerationRequest) -> Constraint | None:
    """Returns the constraint on the output; None if there is none. Raises RequestRefused for more than one."""
    constraints = list(_constraints(request))
    if len(constraints) > 1:
        first, second = constraints[0].path, constraints[1].path
        raise RequestRefused(
            f"{first} and {second} exclude each other: an output has one grammar; send one of them.", field=second
        )
    return constraints[0] if constraints else None


async def compile_constraint(engine: Engine, constraint: Constraint | None) -> CompiledConstraint | None:
    """Returns the compiled grammar of `constraint`, with the check of the keywords that the grammar does not enforce;
    None without a constraint.

    Raises RequestRefused, whose `field` is the constraint's path. For a schema, the JSON pointer of the unsupported
    keyword is appended to the path.
    """
    if constraint is None:
        return None
    spec, path = constraint
    try:
        grammar = await engine.compile(spec)
    except RequestRefused as error:
        error.field = path + (error.field or "")
        raise
    if isinstance(spec, JsonSchema) and grammar.relaxed is not None and grammar.relaxed.unenforced:
        schema = msgspec.json.decode(spec.schema)
        _refuse_unknown_types(schema, path)
        return CompiledConstraint(grammar, SchemaCheck.of(schema, grammar.relaxed, path))
    return CompiledConstraint(grammar)


def _refuse_unknown_types(schema: dict[str, Any], path: str) -> None:
    """Raises RequestRefused for a `type` that JSON Schema does not define, as in llama-server.

    Schemas of tools are exempt, because one invalid schema must not disable the other tools.
    """
    if pointers := unknown_types(schema):
        raise RequestRefused(
            f"{path}{pointers[0]}: JSON Schema has no such type; use {', '.join(JSON_TYPES)} or a list of these.",
            field=path + pointers[0],
        )


def enforced_spec(constraint: Constraint | None, compiled: CompiledConstraint | None) -> GrammarSpec | None:
    """Returns the spec of `constraint` without the keywords that its grammar does not enforce."""
    if constraint is None or compiled is None or compiled.grammar.relaxed is None:
        return None if constraint is None else constraint.spec
    return JsonSchema(msgspec.json.encode(compiled.grammar.relaxed.schema))


def _constraints(request: GenerationRequest) -> Iterator[Constraint]:
    if request.response_format is not None:
        yield from _from_response_format(request.response_format)
    if request.grammar:
        yield Constraint(_gbnf_or_lark(request.grammar), "grammar")
    if request.json_schema is not None:
        yield Constraint(_schema(request.json_schema), "json_schema")
    if request.structured_outputs is not None:
        yield from _from_structured_outputs(request.structured_outputs)
    guided = StructuredOutputs(
        request.guided_json, None, request.guided_regex, request.guided_choice, request.guided_grammar
    )
    yield from _from_structured_outputs(guided, "guided_")


def _from_response_format(response_format: ResponseFormat) -> Iterator[Constraint]:
    match response_format.type:
        case "text":
            return
        case "json_object" if response_format.schema is not None:
            yield Constraint(_object_schema(response_format.schema), "response_format.schema")
        case "json_object":
            yield Constraint(JsonObject(), "response_format")
        case "json_schema":
            if response_format.json_schema is None:
                raise RequestRefused(
                    "response_format.json_schema: the field is missing; type 'json_schema' needs an object with a "
                    "schema.",
                    field="response_format.json_schema",
                )
            named = response_format.json_schema
            yield Constraint(_schema(named.schema, strict=named.strict is True), "response_format.json_schema.schema")
        case other:
            raise RequestRefused(
                f"response_format.type: {other[:64]!r} is not supported; use one of {', '.join(_RESPONSE_FORMATS)}.",
                field="response_format.type",
            )


def _from_structured_outputs(outputs: StructuredOutputs, prefix: str = "structured_outputs.") -> Iterator[Constraint]:
    if outputs.json is not None:
        yield Constraint(_schema(outputs.json), f"{prefix}json")
    if outputs.json_object:
        yield Constraint(JsonObject(), f"{prefix}json_object")
    if outputs.regex is not None:
        yield Constraint(Regex(outputs.regex), f"{prefix}regex")
    if outputs.choice is not None:
        yield Constraint(OneOfTexts(tuple(outputs.choice)), f"{prefix}choice")
    if outputs.grammar:
        yield Constraint(_gbnf_or_lark(outputs.grammar), f"{prefix}grammar")


def _schema(schema: dict[str, Any] | str, *, strict: bool = False) -> JsonSchema:
    """Returns a schema from an object or from JSON text, which clients of vLLM may send."""
    return JsonSchema(schema.encode() if isinstance(schema, str) else msgspec.json.encode(schema), strict=strict)


def _object_schema(schema: dict[str, Any]) -> GrammarSpec:
    """Returns the spec of a `json_object` with a schema, which permits only objects unless it has other types."""
    if _TYPE_KEYWORDS.isdisjoint(name for name, value in schema.items() if value is not None):
        schema = {**schema, "type": "object"}
    return _schema(schema)


def _gbnf_or_lark(text: str) -> GrammarSpec:
    """Returns a Lark grammar if `text` has an `%llguidance` line or a `start` rule, else a GBNF grammar."""
    return Lark(text) if _LARK_LINE.search(text) else Gbnf(text)
