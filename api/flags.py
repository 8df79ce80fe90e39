"""Every setting once: its flags, type, range, default and help, read off the configuration's Structs."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct
from msgspec import inspect as kinds

from api.config import ServerConfig
from engine import BatchConfig, ModelConfig, SamplingParams


class Options(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that `paceline serve` can be told. The fields are the tables of the configuration file."""

    model: ModelConfig
    batch: BatchConfig = BatchConfig()
    server: ServerConfig = ServerConfig()
    sampling: SamplingParams = SamplingParams()


SECTIONS: dict[str, tuple[str, type[Struct]]] = {
    "model": ("the model", ModelConfig),
    "batch": ("how much at once", BatchConfig),
    "server": ("the HTTP side", ServerConfig),
    "sampling": ("sampling of requests that do not say", SamplingParams),
}
"""The tables, each with its subject."""

# As llama-server spells them; the other sampling parameters are spelled like their fields.
_SPELLED = {
    "temperature": ("--temp", "--temperature"),
    "typical_p": ("--typical", "--typical-p"),
    "dry_sequence_breakers": ("--dry-sequence-breaker",),
    "seed": ("-s", "--seed"),
}

IGNORED = (
    "--jinja",
    "--metrics",
    "--slots",
    "--props",
    "--no-webui",
    "--no-ui",
    "-cb",
    "--cont-batching",
    "-kvu",
    "--kv-unified",
    "--log-disable",
)
"""Flags of llama-server that ask for what is always so, or for what changes nothing here."""


class Flag(Struct, frozen=True):
    """One setting and how it is spelled."""

    section: str
    field: str
    names: tuple[str, ...]
    type: Any
    """What `msgspec.convert` makes its values."""
    kind: kinds.Type
    """The same, looked into."""
    default: Any
    help: str

    @property
    def dest(self) -> str:
        """Its place among parsed arguments."""
        return f"{self.section}.{self.field}"

    @property
    def spelled(self) -> str:
        """All names, for people."""
        return "/".join(self.names)

    @property
    def repeatable(self) -> bool:
        """Whether each use adds a value."""
        return isinstance(self.kind, kinds.VarTupleType)

    @property
    def switch(self) -> bool:
        """Whether it takes no value and has a `--no-` form."""
        return isinstance(self.kind, kinds.BoolType)

    @property
    def sign(self) -> str:
        """What stands for a value in the help."""
        match self.kind:
            case kinds.IntType():
                return "N"
            case kinds.FloatType():
                return "X"
            case kinds.LiteralType():
                return "NAME"
        return self.names[-1].strip("-").upper()

    @property
    def expects(self) -> str:
        """The values it takes, in words.

        >>> next(flag for flag in FLAGS if flag.field == "slots").expects
        'a whole number from 1 to 128'
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
        return "text"

    @property
    def default_text(self) -> str:
        """The default, for people."""
        match self.default:
            case msgspec.NODEFAULT:
                return "needed"
            case bool():
                return "on" if self.default else "off"
            case tuple():
                return " ".join(map(repr, self.default)) or "none"
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


def _flags_of(section: str, struct: type[Struct]) -> list[Flag]:
    flags = []
    for field in msgspec.structs.fields(struct):
        kind, notes, extra = kinds.type_info(field.type), {}, {}
        if isinstance(kind, kinds.Metadata):
            notes, extra, kind = kind.extra_json_schema or {}, kind.extra or {}, kind.type
        if isinstance(kind, kinds.UnionType):
            kind = next(part for part in kind.types if not isinstance(part, kinds.NoneType))
        if isinstance(kind, kinds.VarTupleType) and not isinstance(kind.item_type, kinds.StrType):
            continue  # such as logit_bias, which is for requests alone
        plain = (f"--{field.name.replace('_', '-')}",)
        names = extra.get("flags") or _SPELLED.get(field.name, plain)
        about = notes.get("description", "")
        flags.append(Flag(section, field.name, names, field.type, kind, field.default, about))
    return flags


FLAGS = tuple(flag for name, (_, struct) in SECTIONS.items() for flag in _flags_of(name, struct))
"""All settings, by table."""


def flag_table() -> str:
    """The settings as Markdown tables, one for each section; the README holds this text."""
    lines: list[str] = []
    for section, (subject, _) in SECTIONS.items():
        lines += [
            f"**{subject[0].upper()}{subject[1:]}** (`[{section}]` in a `--config` file)",
            "",
            "| flag | key | default | meaning |",
            "| --- | --- | --- | --- |",
        ]
        lines += [_row(flag) for flag in FLAGS if flag.section == section]
        lines.append("")
    lines.append(f"Taken for llama-server's sake, and without effect: {', '.join(f'`{n}`' for n in IGNORED)}.")
    return "\n".join(lines)


def _row(flag: Flag) -> str:
    names = ", ".join(f"`{name}`" for name in flag.names)
    words = flag.expects.removeprefix("a whole number ").removeprefix("a number ").removeprefix("of ")
    takes = "" if flag.switch or flag.expects == "text" else f" ({words})"
    if flag.switch:
        names += f", `--no-{flag.names[-1].removeprefix('--')}`"
    default = flag.default_text.replace("|", "\\|")
    return f"| {names} | `{flag.field}` | {default} | {flag.help}{takes}{'; repeatable' if flag.repeatable else ''} |"
