"""Settings of the prefix cache: offload tiers for evicted KV blocks."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from engine.config.machine import memory_bytes

_MIB = 2**20
# Fraction of the machine's memory that the RAM tier may take without --cache-ram.
_DEFAULT_RAM_FRACTION = 1 / 8


class MemoryConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sizes of the RAM tier and the disk tier of the prefix cache, and approximate reuse of KV blocks."""

    ram: Annotated[
        int,
        Meta(
            ge=-1,
            le=2**30,
            description="maximum MiB of RAM for evicted prefixes and swapped-out sequences; 0 is no RAM tier, -1 is an "
            "eighth of the machine's memory",
        ),
    ] = -1
    reuse: Annotated[
        int,
        Meta(
            ge=0,
            le=2**20,
            description="minimum length in tokens (raised to 16) of a part of a prompt that is moved from another "
            "position, as after a changed line, instead of being computed; the result is approximate; 0 reuses exact "
            "prefixes only, as does --deterministic",
        ),
    ] = 0
    disk: Annotated[
        str, Meta(description="folder of the disk tier, whose prefixes survive a restart; empty is no disk tier")
    ] = ""
    disk_max: Annotated[
        int, Meta(ge=1, le=2**40, description="maximum MiB of this model's files in the folder of --cache-disk")
    ] = 16_384

    @property
    def ram_bytes(self) -> int:
        """Capacity of the RAM tier in bytes."""
        return self.ram * _MIB if self.ram >= 0 else int(memory_bytes() * _DEFAULT_RAM_FRACTION)

    @property
    def offloads(self) -> bool:
        """True if there is a RAM tier or a disk tier for evicted prefixes."""
        return bool(self.ram_bytes or self.disk)

    @property
    def disk_bytes(self) -> int:
        """Capacity of the disk tier in bytes. It has no meaning if `disk` is empty."""
        return self.disk_max * _MIB
