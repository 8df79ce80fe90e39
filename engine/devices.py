"""Description of the devices on which the native library computes."""

from __future__ import annotations

from msgspec import Struct


class DeviceInfo(Struct, frozen=True):
    """A device besides the CPU."""

    name: str
    """The name in `ModelConfig.device`."""
    description: str
    total_bytes: int
    free_bytes: int
