"""Lists the flags in the output of `llama-server --help`: names, number of values and environment variable.

`llama-server --help | python -m bench.peer_flags > tests/api/peer_flags.txt` makes the list that the tests of the
command line use.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator

from msgspec import Struct

# The names of a flag, then the hint of its values, then two spaces and the description.
_FLAG = re.compile(r"(?P<names>-[^\s,]+(?:, +-[^\s,]+)*)(?: (?P<hint>\S.*?))?(?: {2,}.*)?")
# Two hints of one word each; the hint of a single value may contain spaces.
_TWO_VALUES = re.compile(r"[A-Z]+ [A-Z]+")
_VARIABLE = re.compile(r" +\(env: (\w+)\)")


class PeerFlag(Struct, frozen=True):
    """A flag of llama-server."""

    names: tuple[str, ...]
    arity: int
    """Number of values on the command line."""
    env: str
    """Environment variable; empty if there is none."""


def parse_help(lines: Iterable[str]) -> list[PeerFlag]:
    """Returns the flags in the output of `--help`."""
    flags: list[PeerFlag] = []
    for line in lines:
        if line.startswith("-") and not line.startswith("-----") and (found := _FLAG.fullmatch(line.rstrip())):
            hint = found["hint"] or ""
            arity = (2 if _TWO_VALUES.fullmatch(hint) else 1) if hint else 0
            flags.append(PeerFlag(tuple(re.split(", +", found["names"])), arity, ""))
        elif found := _VARIABLE.fullmatch(line.rstrip()):
            flags[-1] = PeerFlag(flags[-1].names, flags[-1].arity, found[1])
    return flags


def format_list(flags: Iterable[PeerFlag]) -> Iterator[str]:
    """Yields a line for each flag: its names, its number of values, and its variable or `-`."""
    for flag in flags:
        yield f"{','.join(flag.names)} {flag.arity} {flag.env or '-'}"


def parse_list(lines: Iterable[str]) -> list[PeerFlag]:
    """Returns the flags in the lines of `format_list`."""
    fields = [line.split() for line in lines]
    return [PeerFlag(tuple(names.split(",")), int(arity), env.strip("-")) for names, arity, env in fields]


if __name__ == "__main__":
    print(*format_list(parse_help(sys.stdin)), sep="\n")
