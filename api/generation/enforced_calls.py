"""The part of tool schemas that the grammar of a message enforces."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from msgspec import Struct

from api.generation.schema_checks import SchemaCheck
from api.tools.formats import AllowedCalls, Tool, UnsupportedNotation
from engine import Engine, JsonSchema, RelaxedSchema, RequestRefused, drop_keyword, relax_schema

# Maximum times that a message's grammar is built again without keywords that its notation cannot express.
_MAX_REBUILDS = 64


class EnforcedCalls(Struct, frozen=True):
    """The allowed calls, each tool with the part of its schema that can be enforced."""

    calls: AllowedCalls
    relaxed: tuple[RelaxedSchema, ...]
    """The enforced part of each tool's schema."""

    @classmethod
    def of(cls, calls: AllowedCalls) -> EnforcedCalls:
        """Returns the calls without the keywords that no grammar can follow. Strict tools keep all keywords."""
        return cls(calls, tuple(_relaxed(tool) for tool in calls.tools))

    @property
    def enforced(self) -> AllowedCalls:
        """The allowed calls with the enforced schemas."""
        tools = [
            msgspec.structs.replace(tool, parameters=relaxed.schema)
            for tool, relaxed in zip(self.calls.tools, self.relaxed, strict=True)
        ]
        return msgspec.structs.replace(self.calls, tools=tuple(tools))

    @property
    def checks(self) -> tuple[SchemaCheck, ...]:
        """The checks of the keywords that are not enforced."""
        return tuple(
            check
            for tool, relaxed in zip(self.calls.tools, self.relaxed, strict=True)
            for check in SchemaCheck.of(tool.parameters, relaxed, tool.path, tool.name)
        )

    def build(self, lark: Callable[[AllowedCalls], str]) -> tuple[str, EnforcedCalls]:
        """Returns the grammar that `lark` builds, and the calls without keywords that the model's notation cannot
        express. Raises RequestRefused with the keyword's path for strict tools."""
        found = self
        for _ in range(_MAX_REBUILDS):
            try:
                return lark(found.enforced), found
            except UnsupportedNotation as error:
                found = found._without(error)
        return lark(found.enforced), found

    def _without(self, error: UnsupportedNotation) -> EnforcedCalls:
        """Returns the calls without the keywords of `error`. Raises `error` if the tool is strict or has none of
        them."""
        index = next(index for index, tool in enumerate(self.calls.tools) if tool.name == error.tool)
        tool, relaxed = self.calls.tools[index], self.relaxed[index]
        error.field = tool.path + (error.pointers[0] if error.pointers else "")
        if tool.strict or not error.pointers:
            raise error
        for pointer in error.pointers:
            fewer = drop_keyword(relaxed, pointer)
            if fewer is None:
                raise error
            relaxed = fewer
        return self._with(index, relaxed)

    async def compiled_alone(self, engine: Engine) -> EnforcedCalls:
        """Returns the calls without the keywords with which a tool's schema does not compile. Raises RequestRefused
        with the keyword's path for strict tools, and for a schema without any part that can be enforced."""
        found = self
        for index, (tool, relaxed) in enumerate(zip(self.calls.tools, self.relaxed, strict=True)):
            fewer = await _compiled(engine, tool, relaxed)
            if fewer == relaxed and not tool.strict:
                fewer = await _compiled_with_all_properties(engine, tool, relaxed)
            found = found._with(index, fewer)
        return found

    def _with(self, index: int, relaxed: RelaxedSchema) -> EnforcedCalls:
        schemas = (*self.relaxed[:index], relaxed, *self.relaxed[index + 1 :])
        return EnforcedCalls(self.calls, schemas)


def _relaxed(tool: Tool) -> RelaxedSchema:
    try:
        return relax_schema(dict(tool.parameters), strict=tool.strict)
    except RecursionError:  # the compiler refuses a schema that is nested so deep
        return RelaxedSchema(dict(tool.parameters), ())


async def _compiled(engine: Engine, tool: Tool, relaxed: RelaxedSchema) -> RelaxedSchema:
    """Returns the part of a tool's schema that compiles. Raises RequestRefused with the keyword's path."""
    spec = JsonSchema(msgspec.json.encode(relaxed.schema), strict=tool.strict)
    try:
        compiled = (await engine.compile(spec)).relaxed
    except RequestRefused as error:
        error.field = tool.path + (error.field or "")
        raise
    if compiled is None or not compiled.unenforced:
        return relaxed
    return RelaxedSchema(compiled.schema, relaxed.unenforced + compiled.unenforced)


async def _compiled_with_all_properties(engine: Engine, tool: Tool, relaxed: RelaxedSchema) -> RelaxedSchema:
    """Returns the part of a tool's schema that compiles if no property may be absent.

    Notations that write values without JSON have a grammar for each property, also for one that permits no value.
    """
    schema = relaxed.schema
    if not isinstance(properties := schema.get("properties"), dict):
        return relaxed
    fewer = await _compiled(engine, tool, RelaxedSchema({**schema, "required": [*properties]}, relaxed.unenforced))
    if fewer.unenforced == relaxed.unenforced:
        return relaxed
    return RelaxedSchema({**fewer.schema, "required": schema.get("required", [])}, fewer.unenforced)
