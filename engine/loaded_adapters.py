"""The LoRA adapters of an engine on the event loop: their default scales, and the sets of requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec import structs

from engine.adapters import AdapterInfo, AdapterScale, AdapterSet
from engine.contract import Request, RequestRefused

# Limit of the scale of a LoRA adapter. Scales of useful adapters are below 10.
MAX_ADAPTER_SCALE = 1e6


class LoadedAdapters:
    """The adapters by number, with the default scales of later requests."""

    def __init__(self, infos: Sequence[AdapterInfo]) -> None:
        self.infos = tuple(infos)
        """The adapters with their current default scales."""
        self._default = self._select({info.id: info.scale for info in infos})

    def set_scales(self, scales: Mapping[int, float]) -> None:
        """Sets the default scales: 0 for adapters that are not in `scales`. Raises RequestRefused with nothing
        changed."""
        self._default = self._select(scales)
        self.infos = tuple(structs.replace(info, scale=scales.get(info.id, 0.0)) for info in self.infos)

    def resolve(self, request: Request) -> Request:
        """Returns `request` with its set of adapters or else the default set. Raises RequestRefused."""
        if request.adapters is None:
            return structs.replace(request, adapters=self._default) if self._default else request
        scales = {each.id: each.scale for each in request.adapters}
        return structs.replace(request, adapters=self._select(scales))

    def _select(self, scales: Mapping[int, float]) -> AdapterSet:
        for number, scale in scales.items():
            if not 0 <= number < len(self.infos):
                known = f"adapters are 0 to {len(self.infos) - 1}" if self.infos else "serve with --lora to load some"
                raise RequestRefused(f"lora: there is no adapter {number}; {known}.", field="lora")
            if not abs(scale) <= MAX_ADAPTER_SCALE:
                raise RequestRefused(
                    f"lora: the scale of adapter {number} must be from -{MAX_ADAPTER_SCALE:g} to "
                    f"{MAX_ADAPTER_SCALE:g}, not {scale:g}.",
                    field="lora",
                )
        digests = [info.digest for info in self.infos]
        return tuple(AdapterScale(each, scales[each], digests[each]) for each in sorted(scales) if scales[each])
