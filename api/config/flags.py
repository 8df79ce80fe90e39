"""Every setting once: its flags, type, range, default and help, read off the configuration's Structs."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct
from msgspec import inspect as kinds

from api.config.server import ChatConfig, ServerConfig
from engine import (
    BatchConfig,
    DraftConfig,
    EngineConfig,
    MemoryConfig,
    ModelConfig,
    SamplingParams,
    SimConfig,
    SpeculationConfig,
)

# Speculation types that llama-server spells otherwise.
RENAMED = {"draft-simple": "draft"}


class Options(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that `paceline serve` can be told. The fields are the tables of the configuration file."""

    model: ModelConfig
    batch: BatchConfig = BatchConfig()
    memory: MemoryConfig = MemoryConfig()
    speculation: SpeculationConfig = SpeculationConfig()
    draft: DraftConfig = DraftConfig()
    sim: SimConfig = SimConfig()
    server: ServerConfig = ServerConfig()
    chat: ChatConfig = ChatConfig()
    sampling: SamplingParams = SamplingParams()

    @property
    def engine(self) -> EngineConfig:
        """What of them the engine needs."""
        return EngineConfig(
            model=self.model,
            batch=self.batch,
            memory=self.memory,
            speculation=self.speculation,
            draft=self.draft,
            sim=self.sim,
        )


SECTIONS: dict[str, tuple[str, type[Struct]]] = {
    "model": ("the model", ModelConfig),
    "batch": ("how much at once", BatchConfig),
    "memory": ("prefixes that nobody needs right now", MemoryConfig),
    "speculation": ("who guesses ahead", SpeculationConfig),
    "draft": ("the draft model", DraftConfig),
    "sim": ("load tests without weights", SimConfig),
    "server": ("the HTTP side", ServerConfig),
    "chat": ("chat templates", ChatConfig),
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

# Those of llama-server for the sampling parameters; the other fields name theirs.
_VARIABLES = {
    field: f"LLAMA_ARG_{field.upper()}"
    for field in (
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repeat_penalty",
        "presence_penalty",
        "frequency_penalty",
    )
}

IGNORED = (
    "--jinja",
    "--metrics",
    "--props",
    "--no-webui",
    "--no-ui",
    "-cb",
    "--cont-batching",
    "--log-disable",
    "--spec-draft-backend-sampling",
    "--no-spec-draft-backend-sampling",
)
"""Flags of llama-server that ask for what is always so, or for what changes nothing here."""

IGNORED_WITH_VALUE = ("--spec-draft-p-split", "--draft-p-split", "--spec-draft-sampling")
"""The same of those that take a value."""


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
    env: str
    """The environment variable that sets it, if there is one."""
    choices: tuple[str, ...]
    """What the texts of a list may be; empty if anything."""
    separated: bool
    """Whether one text holds several values, with commas between them."""

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
            case kinds.VarTupleType() if self.choices:
                return "NAMES"
        return self.names[-1].strip("-").upper()

    @property
    def expects(self) -> str:
        """The values it takes, in words.

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
        """The default, for people."""
        match self.default:
            case msgspec.NODEFAULT:
                return "needed"
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


def _flag_of(section: str, field: msgspec.structs.FieldInfo) -> Flag | None:
    """The flag of a field; None for one such as logit_bias, which is for requests alone."""
    kind, notes, extra = kinds.type_info(field.type), {}, {}
    if isinstance(kind, kinds.Metadata):
        notes, extra, kind = kind.extra_json_schema or {}, kind.extra or {}, kind.type
    if isinstance(kind, kinds.UnionType):
        kind = next(part for part in kind.types if not isinstance(part, kinds.NoneType))
    choices = _choices(kind.item_type) if isinstance(kind, kinds.VarTupleType) else ()
    if isinstance(kind, kinds.VarTupleType) and not choices and not isinstance(kind.item_type, kinds.StrType):
        return None
    plain = (f"--{field.name.replace('_', '-')}",)
    return Flag(
        section,
        field.name,
        extra.get("flags") or _SPELLED.get(field.name, plain),
        field.type,
        kind,
        field.default,
        notes.get("description", ""),
        extra.get("env") or _VARIABLES.get(field.name, ""),
        choices,
        bool(choices) or extra.get("separated", False),
    )


def _choices(kind: kinds.Type) -> tuple[str, ...]:
    match kind:
        case kinds.LiteralType(values=values):
            return tuple(map(str, values))
        case kinds.UnionType(types=types):
            return tuple(sorted(name for part in types for name in _choices(part)))
    return ()


FLAGS = tuple(
    flag
    for section, (_, struct) in SECTIONS.items()
    for field in msgspec.structs.fields(struct)
    if (flag := _flag_of(section, field)) is not None
)
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
    ignored = ", ".join(f"`{name}`" for name in IGNORED + IGNORED_WITH_VALUE)
    lines.append(f"Taken for llama-server's sake, and without effect: {ignored}.")
    return "\n".join(lines)


def _row(flag: Flag) -> str:
    names = ", ".join(f"`{name}`" for name in flag.names)
    words = flag.expects.removeprefix("a whole number ").removeprefix("a number ").removeprefix("of ")
    takes = "" if flag.switch or flag.expects == "text" else f" ({words})"
    if flag.switch:
        names += f", `--no-{flag.names[-1].removeprefix('--')}`"
    if flag.env:
        names += f", `${flag.env}`"
    default = flag.default_text.replace("|", "\\|")
    return f"| {names} | `{flag.field}` | {default} | {flag.help}{takes}{'; repeatable' if flag.repeatable else ''} |"
