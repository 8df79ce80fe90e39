"""Flags of `paceline serve`, generated from the configuration Structs and their spellings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Struct, inspect

from api.config.options import Options
from api.config.spelling import Spelling
from api.config.spellings import SPELLINGS
from api.http.decode_errors import describe_type

# Heading of each table of a configuration file.
HEADINGS = {
    "model": "Model",
    "hub": "Downloaded models",
    "load": "Loading the weights",
    "rope": "Scaling of positions",
    "cpu": "Processor",
    "batch": "Context and batches",
    "memory": "Prefix cache",
    "speculation": "Speculative decoding",
    "draft": "Draft model",
    "sim": "Simulation",
    "embedding": "Embeddings and reranking",
    "adapters": "LoRA adapters and control vectors",
    "media": "Images and sounds",
    "server": "HTTP server",
    "kv_events": "KV events",
    "log": "Log",
    "chat": "Chat templates and reasoning",
    "generation": "Generation",
    "sampling": "Default sampling parameters",
}

# Types whose allowed values are part of the help.
_RESTRICTED_TYPES = (inspect.IntType, inspect.FloatType, inspect.LiteralType)


class Flag(Struct, frozen=True):
    """One setting of the server, with its flags and its environment variable."""

    table: str
    """Table of a configuration file."""
    field: str
    """Key in `table`."""
    names: tuple[str, ...]
    """Spellings on the command line, llama-server's first."""
    type: Any
    """Type for `msgspec.convert`."""
    kind: inspect.Type
    """msgspec's description of `type`, without metadata and `None`."""
    default: Any
    help: str
    env: str
    """Environment variable; empty if there is none."""
    default_flag: str
    """Flag whose value is the default; empty if the default is `default`."""
    choices: tuple[str, ...]
    """Allowed items of a list; empty if any text is allowed."""
    comma_separated: bool
    """True if one argument may hold several values, separated by commas."""
    off_names: tuple[str, ...]
    """Spellings that turn a switch off."""
    older_env: tuple[str, ...]
    """Environment variables of earlier versions of llama-server."""
    aliases: Mapping[str, str]
    """llama-server's words for some values. An empty value is the default."""
    example: str
    """A value, for errors about a text that must have a form; empty if any text is allowed."""

    @property
    def dest(self) -> str:
        """Name of the attribute in argparse's namespace."""
        return f"{self.table}.{self.field}"

    @property
    def spelled(self) -> str:
        """All names, joined for error messages."""
        return "/".join(self.names)

    @property
    def repeatable(self) -> bool:
        """True if the flag can be repeated and each use adds a value."""
        return isinstance(self.kind, inspect.VarTupleType)

    @property
    def switch(self) -> bool:
        """True if the flag takes no value and has a `--no-` form."""
        return isinstance(self.kind, inspect.BoolType)

    @property
    def listed_off_names(self) -> tuple[str, ...]:
        """`off_names` without the short `-no-` forms, for the help."""
        return tuple(name for name in self.off_names if not name.startswith("-no-"))

    @property
    def three_way(self) -> bool:
        """True if on and off are among the values. The flag without a value then means on."""
        return isinstance(self.kind, inspect.LiteralType) and {"on", "off"} <= set(self.kind.values)

    @property
    def arity(self) -> int:
        """Number of values on the command line."""
        if self.switch:
            return 0
        return len(self.kind.item_types) if isinstance(self.kind, inspect.TupleType) else 1

    @property
    def metavar(self) -> str:
        """Placeholder of the value in the help."""
        match self.kind:
            case inspect.IntType():
                return "N"
            case inspect.FloatType():
                return "X"
            case inspect.LiteralType():
                return "NAME"
            case inspect.VarTupleType() if self.choices:
                return "NAMES"
        return self.names[-1].strip("-").upper()

    @property
    def expects(self) -> str:
        """Allowed values, in words.

        >>> next(flag for flag in FLAGS if flag.field == "slots").expects
        'a whole number from 0 to 256'
        """
        if self.choices:
            return "some of " + ", ".join(self.choices)
        if self.example:
            return f"a text such as {self.example}"
        if isinstance(self.kind, inspect.TupleType):
            return " and ".join(map(describe_type, self.kind.item_types))
        return "on or off" if self.switch else describe_type(self.kind)

    @property
    def allowed(self) -> str:
        """Allowed values, short, for the help. Empty if any text is allowed, or the flag takes no value.

        >>> next(flag for flag in FLAGS if flag.field == "slots").allowed
        'from 0 to 256'
        """
        if self.switch or not (self.choices or isinstance(self.kind, _RESTRICTED_TYPES)):
            return ""
        return self.expects.removeprefix("a whole number ").removeprefix("a number ").removeprefix("of ")

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
            case None if self.default_flag:
                return f"as {self.default_flag}"
            case None if self.switch:
                return "chosen at start"
            case None | "":
                return "none"
        return f"{self.default:g}" if isinstance(self.default, float) else str(self.default)


def _flag(table: str, struct: type[Struct], field: msgspec.structs.FieldInfo) -> Flag | None:
    """Returns the flag of a field. None means that the field has no flag: only requests can set the field."""
    spelling = SPELLINGS[struct].get(field.name)
    if spelling is None:
        return None
    kind, schema = inspect.type_info(field.type), {}
    if isinstance(kind, inspect.Metadata):
        schema, kind = kind.extra_json_schema or {}, kind.type
    if isinstance(kind, inspect.UnionType):
        kind = next(part for part in kind.types if not isinstance(part, inspect.NoneType))
    choices = _choices(kind.item_type) if isinstance(kind, inspect.VarTupleType) else ()
    return Flag(
        table,
        field.name,
        spelling.flags,
        field.type,
        kind,
        field.default,
        schema.get("description", ""),
        spelling.env,
        spelling.default_flag,
        choices,
        bool(choices) or spelling.comma_separated,
        _off_names(spelling) if isinstance(kind, inspect.BoolType) else (),
        spelling.older_env,
        spelling.aliases,
        next(iter(schema.get("examples", ())), ""),
    )


def _off_names(spelling: Spelling) -> tuple[str, ...]:
    """Returns the `--no-` forms of a switch and its other negative spellings."""
    names = [name for name in spelling.flags if not name.lstrip("-").startswith("no-")]
    derived = [name[: len(name) - len(bare)] + f"no-{bare}" for name in names if (bare := name.lstrip("-"))]
    return (*spelling.off_flags, *derived)


def _choices(kind: inspect.Type) -> tuple[str, ...]:
    match kind:
        case inspect.LiteralType(values=values):
            return tuple(map(str, values))
        case inspect.UnionType(types=types):
            return tuple(sorted(name for part in types for name in _choices(part)))
    return ()


# All flags, in the order of the tables and of their fields.
FLAGS = tuple(
    flag
    for table in msgspec.structs.fields(Options)
    for field in msgspec.structs.fields(table.type)
    if (flag := _flag(table.name, table.type, field)) is not None
)
