"""Flags of llama-server and its relatives that set nothing here: accepted without effect, or refused."""

from __future__ import annotations

from typing import NamedTuple


class OtherFlag(NamedTuple):
    """A flag that is known but sets nothing."""

    names: tuple[str, ...]
    reason: str
    """Clause or sentence for the reference and for the error."""
    arity: int
    """Number of values on the command line."""
    env: str
    """Environment variable; empty if there is none."""
    refused: bool
    """True if the flag is an error."""
    harmless: tuple[str, ...]
    """Values with which a refused flag has no effect."""


def without_effect(names: str, reason: str, arity: int = 0, env: str = "") -> OtherFlag:
    """Returns a flag that is accepted and does nothing. `names` are separated by spaces."""
    return OtherFlag(tuple(names.split()), reason, arity, env, False, ())


def refused(names: str, reason: str, arity: int = 0, env: str = "", harmless: tuple[str, ...] = ()) -> OtherFlag:
    """Returns a flag that ends the command with `reason`, which names a replacement. `names` are separated by
    spaces."""
    return OtherFlag(tuple(names.split()), reason, arity, env, True, harmless)
