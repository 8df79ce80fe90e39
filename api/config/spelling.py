"""The type of a setting's spellings, and llama-server's names of proposers."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

# Paceline's name for each proposer type that llama-server names differently.
PROPOSER_TYPE_ALIASES = {"draft-simple": "draft", "mtp": "draft-mtp"}
# llama-server's proposer types that do not exist here.
MISSING_PROPOSER_TYPES = ("draft-eagle3", "draft-dflash", "draft-dspark")


class Spelling(NamedTuple):
    """The command-line flags and the environment variable of one setting."""

    flags: tuple[str, ...]
    env: str
    """Environment variable; empty if there is none."""
    comma_separated: bool
    """True if one argument may hold several values of text, separated by commas."""
    default_flag: str
    """Flag whose value is the default; empty if the field has a default of its own."""
    off_flags: tuple[str, ...]
    """Flags that turn a switch off, besides the `--no-` forms of `flags`."""
    older_env: tuple[str, ...]
    """Environment variables of earlier versions of llama-server."""
    aliases: Mapping[str, str]
    """llama-server's words for some values. An empty value is the default."""


def spelling(
    *flags: str,
    env: str = "",
    comma_separated: bool = False,
    default_flag: str = "",
    off_flags: tuple[str, ...] = (),
    older_env: tuple[str, ...] = (),
    aliases: Mapping[str, str] = MappingProxyType({}),
) -> Spelling:
    """Returns the spellings of a setting, with defaults."""
    return Spelling(flags, env, comma_separated, default_flag, off_flags, older_env, aliases)
