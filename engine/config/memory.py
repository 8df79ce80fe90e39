"""Where prefixes go that nobody needs right now."""

from __future__ import annotations

import os
from typing import Annotated

from msgspec import Meta, Struct

from engine.config.flags import flags

MEBIBYTE = 2**20
EIGHTH = 8
"""Of the machine's memory, the share of prefixes in RAM if nothing is said."""


class MemoryConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where prefixes go that nobody needs right now."""

    ram: Annotated[
        int,
        Meta(
            ge=-1,
            le=2**30,
            description="MiB of RAM for prefixes that left the cells, and for requests that had to give theirs up; "
            "0 is none, -1 an eighth of the machine's memory",
            extra=flags("-cram", "--cache-ram", env="LLAMA_ARG_CACHE_RAM"),
        ),
    ] = -1
    reuse: Annotated[
        int,
        Meta(
            ge=0,
            le=2**20,
            description="tokens that must recur (16 at least) for what follows a changed part of a prompt to be moved "
            "instead of computed, which is not exact; 0 moves nothing, as always with --deterministic",
            extra=flags("--cache-reuse", env="LLAMA_ARG_CACHE_REUSE"),
        ),
    ] = 0
    disk: Annotated[
        str,
        Meta(
            description="folder in which prefixes outlive the server; empty is none",
            extra=flags("--cache-disk"),
        ),
    ] = ""
    disk_max: Annotated[
        int,
        Meta(
            ge=1,
            le=2**40,
            description="MiB of that folder for this model at most",
            extra=flags("--cache-disk-max"),
        ),
    ] = 16_384

    @property
    def ram_bytes(self) -> int:
        """Bytes of RAM for prefixes."""
        if self.ram >= 0:
            return self.ram * MEBIBYTE
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // EIGHTH

    @property
    def keeps(self) -> bool:
        """Whether prefixes that leave the cells are kept anywhere."""
        return bool(self.ram_bytes or self.disk)

    @property
    def disk_bytes(self) -> int:
        """Bytes of files at most."""
        return self.disk_max * MEBIBYTE
