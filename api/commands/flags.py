"""`paceline flags`: the reference of all flags, as Markdown."""

from __future__ import annotations

from api.config.flags import FLAGS, HEADINGS, Flag
from api.config.spellings import IGNORED_FLAGS, IGNORED_FLAGS_WITH_VALUE

_INTRODUCTION = """\
# Flags of `paceline serve`

Made by `python -m api flags > api/FLAGS.md` from the fields in `engine/config` and `api/config`.

Each setting is a flag, a key of a TOML file (`--config file.toml`) and, where a `$NAME` is given, an environment
variable. Flags override environment variables, which override the file.
"""


def flag_reference() -> str:
    """Returns the text of `api/FLAGS.md`."""
    sections = [_section(table, heading) for table, heading in HEADINGS.items()]
    ignored = ", ".join(f"`{name}`" for name in IGNORED_FLAGS + IGNORED_FLAGS_WITH_VALUE)
    return "\n".join([_INTRODUCTION, *sections, f"Flags of llama-server without effect: {ignored}.\n"])


def _section(table: str, heading: str) -> str:
    lines = [
        f"## {heading}",
        "",
        f"Table `[{table}]` of a `--config` file.",
        "",
        "| flag | key | default | meaning |",
        "| --- | --- | --- | --- |",
        *(_row(flag) for flag in FLAGS if flag.table == table),
    ]
    return "\n".join(lines) + "\n"


def _row(flag: Flag) -> str:
    names = ", ".join(f"`{name}`" for name in flag.names)
    if flag.switch:
        names += f", `--no-{flag.names[-1].removeprefix('--')}`"
    if flag.env:
        names += f", `${flag.env}`"
    allowed = flag.expects.removeprefix("a whole number ").removeprefix("a number ").removeprefix("of ")
    values = "" if flag.switch or flag.expects == "text" else f" ({allowed})"
    repeatable = "; repeatable" if flag.repeatable else ""
    default = flag.default_text.replace("|", "\\|")
    return f"| {names} | `{flag.field}` | {default} | {flag.help}{values}{repeatable} |"
