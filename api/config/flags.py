"""Flags of `paceline serve`, generated from the configuration Structs and their spellings."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct
from msgspec import inspect as kinds

from api.config.options import Options
from api.config.spellings import SPELLINGS

# Heading of each table of a configuration file.
HEADINGS = {
    "model": "Model",
    "batch": "Context and batches",
    "memory": "Prefix cache",
    "speculation": "Speculative decoding",
    "draft": "Draft model",
    "sim": "Simulation",
    "server": "HTTP server",
    "chat": "Chat templates and reasoning",
    "sampling": "Default sampling parameters",
}


class Flag(Struct, frozen=True):
    """One setting with its spellings."""

    table: str
    """Table of a configuration file."""
    field: str
    """Key in `table`."""
    names: tuple[str, ...]
    """Spellings on the command line, llama-server's first."""
    type: Any
    """Type for `msgspec.convert`."""
    kind: kinds.Type
    """msgspec's description of `type`, without metadata and `None`."""
    default: Any
    help: str
    env: str
    """Environment variable; empty if there is none."""
    choices: tuple[str, ...]
    """Allowed items of a list; empty if any text is allowed."""
    comma_separated: bool
    """True if one argument may hold several values, separated by commas."""

    @property
    def dest(self) -> str:
        """Attribute of argparse's namespace."""
        return f"{self.table}.{self.field}"

    @property
    def spelled(self) -> str:
        """All names, for error messages."""
        return "/".join(self.names)

    @property
    def repeatable(self) -> bool:
        """True if each use adds a value."""
        return isinstance(self.kind, kinds.VarTupleType)

    @property
    def switch(self) -> bool:
        """True if the flag takes no value and has a `--no-` form."""
        return isinstance(self.kind, kinds.BoolType)

    @property
    def metavar(self) -> str:
        """Placeholder of the value in the help."""
        match self.kind:
            case kinds.IntType():
                return "N"
            case kinds.FloatType():
                return "X"
            case kinds.LiteralType():
                return "NAME"
            case kinds.VarTupleType() if self.choices:
                return "NAMES"
        return self.names[-1].strip("-").upper()

    @property
    def expects(self) -> str:
        """Allowed values, in words.

        >>> next(flag for flag in FLAGS if flag.field == "slots").expects
        'a whole number from 1 to 256'
        """
        match self.kind:
            case kinds.LiteralType(values=values):
                return "one of " + ", ".join(map(str, values))
            case kinds.IntType():
                return "a whole number" + _range(self.kind)
            case kinds.FloatType():
                return "a number" + _range(self.kind)
            case kinds.BoolType():
                return "on or off"
            case kinds.VarTupleType() if self.choices:
                return "some of " + ", ".join(self.choices)
        return "text"

    @property
    def default_text(self) -> str:
        """The default, in words."""
        match self.default:
            case msgspec.NODEFAULT:
                return "required"
            case bool():
                return "on" if self.default else "off"
            case tuple():
                return " ".join(map(repr, self.default)) or "none"
            case None if self.switch:
                return "chosen at start"
            case None | "":
                return "none"
        return f"{self.default:g}" if isinstance(self.default, float) else str(self.default)


def _range(kind: kinds.IntType | kinds.FloatType) -> str:
    top = None if kind.le is None or kind.le >= 2**53 else f"{kind.le:.10g}"
    if kind.gt is not None:
        return f" above {kind.gt:g}" + (f", up to {top}" if top else "")
    if kind.ge is None:
        return ""
    return f" from {kind.ge:g} to {top}" if top else f" of at least {kind.ge:g}"


def _flag(table: str, struct: type[Struct], field: msgspec.structs.FieldInfo) -> Flag | None:
    """Returns the flag of a field. `None` means a field without a spelling, which only requests have."""
    spelling = SPELLINGS[struct].get(field.name)
    if spelling is None:
        return None
    kind, schema = kinds.type_info(field.type), {}
    if isinstance(kind, kinds.Metadata):
        schema, kind = kind.extra_json_schema or {}, kind.type
    if isinstance(kind, kinds.UnionType):
        kind = next(part for part in kind.types if not isinstance(part, kinds.NoneType))
    choices = _choices(kind.item_type) if isinstance(kind, kinds.VarTupleType) else ()
    return Flag(
        table,
        field.name,
        spelling.flags,
        field.type,
        kind,
        field.default,
        schema.get("description", ""),
        spelling.env,
        choices,
        bool(choices) or spelling.comma_separated,
    )


def _choices(kind: kinds.Type) -> tuple[str, ...]:
    match kind:
        case kinds.LiteralType(values=values):
            return tuple(map(str, values))
        case kinds.UnionType(types=types):
            return tuple(sorted(name for part in types for name in _choices(part)))
    return ()


# In the order of the tables and of their fields.
FLAGS = tuple(
    flag
    for table in msgspec.structs.fields(Options)
    for field in msgspec.structs.fields(table.type)
    if (flag := _flag(table.name, table.type, field)) is not None
)
