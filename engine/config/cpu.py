"""Settings of the threads that compute on the CPU: cores, priority and NUMA nodes."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from msgspec import Meta, Struct

# The library's `GGML_MAX_N_THREADS`.
MAX_CPUS = 512

_Bit = Annotated[int, Meta(ge=0, le=1)]
_Poll = Annotated[int, Meta(ge=0, le=100)]


class CpuConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Cores, priority and waiting of the library's threads. The draft model is computed by the same threads."""

    mask: Annotated[
        str, Meta(description="CPUs that compute steps of one row, as hexadecimal bits; adds to --cpu-range")
    ] = ""
    range: Annotated[str, Meta(description="CPUs that compute steps of one row, as first-last; adds to --cpu-mask")] = (
        ""
    )
    strict: Annotated[_Bit, Meta(description="1 pins each thread to one of these CPUs")] = 0
    mask_batch: Annotated[str, Meta(description="--cpu-mask of steps with several rows; empty is the same CPUs")] = ""
    range_batch: Annotated[str, Meta(description="--cpu-range of steps with several rows; empty is the same CPUs")] = ""
    strict_batch: Annotated[_Bit | None, Meta(description="--cpu-strict of steps with several rows")] = None
    poll: Annotated[
        _Poll | None,
        Meta(
            description="level of polling by threads without work, 0 is none; no effect in a library with OpenMP, "
            "which uses GOMP_SPINCOUNT instead"
        ),
    ] = None
    poll_batch: Annotated[_Poll | None, Meta(description="--poll of steps with several rows")] = None
    priority: Annotated[
        int,
        Meta(
            ge=-1,
            le=3,
            description="priority of the computing threads: -1 low, 0 normal, 1 medium, 2 high, 3 realtime, which add "
            "5, 0, -5, -10 and -20 to the niceness of the process",
        ),
    ] = 0
    engine_process: Annotated[
        bool,
        Meta(
            description="run the engine in a process of its own: more tokens a second for many streams of a fast "
            "model, as HTTP and steps share no GIL; a crash of the native library ends that process only"
        ),
    ] = False
    numa: Annotated[
        Literal["off", "distribute", "isolate", "numactl"],
        Meta(
            description="NUMA nodes that compute: distribute spreads threads over all nodes, isolate keeps them on the "
            "node on which the process started, numactl uses the CPUs that numactl selected"
        ),
    ] = "off"

    @property
    def cpus(self) -> frozenset[int]:
        """CPUs of steps with one row; empty means all. Raises ValueError."""
        return _cpus_of_mask("--cpu-mask", self.mask) | _cpus_of_range("--cpu-range", self.range)

    @property
    def cpus_batch(self) -> frozenset[int]:
        """CPUs of steps with several rows; empty means all. Raises ValueError."""
        mask = _cpus_of_mask("--cpu-mask-batch", self.mask_batch)
        return mask | _cpus_of_range("--cpu-range-batch", self.range_batch) or self.cpus


def _cpus_of_mask(flag: str, mask: str) -> frozenset[int]:
    digits = mask.removeprefix("0x")
    if not mask:
        return frozenset()
    if not re.fullmatch(r"[0-9a-fA-F]{1,128}", digits) or not (bits := int(digits, 16)):
        raise ValueError(f"{flag} {mask} is no mask: use up to 128 hexadecimal digits, not all 0, such as 0xff")
    return frozenset(cpu for cpu in range(MAX_CPUS) if bits >> cpu & 1)


def _cpus_of_range(flag: str, text: str) -> frozenset[int]:
    if not text:
        return frozenset()
    found = re.fullmatch(r"(\d{0,3})-(\d{0,3})", text)
    first, last = (int(found[1] or 0), int(found[2] or MAX_CPUS - 1)) if found else (1, 0)
    if not first <= last < MAX_CPUS:
        raise ValueError(f"{flag} {text} is no range: use two numbers from 0 to {MAX_CPUS - 1}, such as 0-7")
    return frozenset(range(first, last + 1))
