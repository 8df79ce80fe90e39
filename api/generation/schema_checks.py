"""Schemas of which a grammar enforces a part: their other keywords are checked in the finished output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from msgspec import UNSET, Struct, UnsetType

from api.generation.json_validation import satisfies_schema
from api.schema.replies import UnenforcedKeywords
from api.tools.formats import ArgumentsDelta, ContentDelta, MessageParser, ToolCallStart
from engine import Grammar, RelaxedSchema, relax_schema


class SchemaCheck(Struct, frozen=True):
    """A schema of the request with keywords that the grammar does not enforce."""

    schema: dict[str, Any]
    """The whole schema, without keywords that have no effect."""
    unenforced: tuple[str, ...]
    """The paths of the keywords in the request."""
    tool: str | None = None
    """The tool whose arguments the schema describes. None if it describes the answer."""

    @classmethod
    def of(
        cls, schema: Mapping[str, Any], relaxed: RelaxedSchema, path: str, tool: str | None = None
    ) -> tuple[SchemaCheck, ...]:
        """Returns the check of the schema at `path` in the request; nothing if all of it is enforced."""
        if not relaxed.unenforced:
            return ()
        whole = relax_schema(dict(schema), strict=True).schema
        return (cls(whole, tuple(f"{path}{pointer}" for pointer in relaxed.unenforced), tool),)


class CompiledConstraint(Struct, frozen=True):
    """The grammar of an output, and the checks of what the grammar does not enforce."""

    grammar: Grammar
    checks: tuple[SchemaCheck, ...] = ()
    new_parser: Callable[[], MessageParser | None] = lambda: None
    """Returns the parser of one output; None if the output is the answer."""

    def unenforced_keywords(self, output: str) -> UnenforcedKeywords | UnsetType:
        """Returns the keywords that are not enforced, and whether a finished output satisfies them all."""
        if not self.checks:
            return UNSET
        keywords = [path for check in self.checks for path in check.unenforced]
        return UnenforcedKeywords(keywords, [self._satisfied(output)])

    def _satisfied(self, output: str) -> bool | None:
        """Returns None if a schema cannot be checked, or if it describes no part of the output."""
        results = [satisfies_schema(text, schema) for text, schema in self._described_parts(output)]
        if not results or (None in results and False not in results):
            return None
        return False not in results

    def _described_parts(self, output: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields the answer or the arguments of each call, with the schema of a check that describes it."""
        answer, calls = _message_parts(output, self.new_parser())
        for check in self.checks:
            if check.tool is None and not calls:
                yield answer, check.schema
            yield from ((arguments, check.schema) for name, arguments in calls if name == check.tool)


def _message_parts(output: str, parser: MessageParser | None) -> tuple[str, list[tuple[str, str]]]:
    """Returns the answer in an output, and the name and the arguments of each call."""
    if parser is None:
        return output, []
    content: list[str] = []
    names: list[str] = []
    arguments: list[list[str]] = []
    for delta in [*parser.feed(output), *parser.finish()]:
        match delta:
            case ContentDelta(text):
                content.append(text)
            case ToolCallStart(name=name):
                names.append(name)
                arguments.append([])
            case ArgumentsDelta(index, text):
                arguments[index].append(text)
    return "".join(content), [(name, "".join(parts)) for name, parts in zip(names, arguments, strict=True)]
