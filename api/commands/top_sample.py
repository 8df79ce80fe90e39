"""A sample of a running server: its slots and its metrics."""

from __future__ import annotations

import time
from collections.abc import Mapping

from msgspec import Struct
from prometheus_client.parser import text_string_to_metric_families

from api.commands.server_client import ServerClient, ServerError

# Status of an endpoint that is turned off.
_DISABLED = 501


class SlotDrafts(Struct, frozen=True):
    """Draft tokens of one proposer type in a slot's request."""

    type: str
    drafted: int
    accepted: int


class SlotProgress(Struct, frozen=True):
    """Decode progress of a slot's request."""

    n_decoded: int = 0


class ListedSlot(Struct, frozen=True):
    """A slot in the reply of GET /slots."""

    id: int
    n_ctx: int
    is_processing: bool
    id_task: int = -1
    n_prompt_tokens: int = 0
    """Computed tokens of prompt and output."""
    n_prompt_tokens_processed: int = 0
    n_prompt_tokens_cache: int = 0
    prompt_tokens: int = 0
    next_token: list[SlotProgress] = []
    n_draft: int = 0
    drafts: list[SlotDrafts] = []

    @property
    def decoded(self) -> int:
        """Number of emitted tokens."""
        return sum(each.n_decoded for each in self.next_token)


class ServerMemory(Struct, frozen=True):
    """The part of `memory` in GET /props that the view shows."""

    kv_unified: bool = True
    ram_bytes: int = 0
    disk_bytes: int = 0


class ServerFacts(Struct, frozen=True):
    """The part of GET /props that the view shows."""

    model_alias: str = ""
    total_slots: int = 0
    build_info: str = ""
    deterministic: bool = False
    memory: ServerMemory = ServerMemory()


class Metrics:
    """The values of GET /metrics."""

    def __init__(self, text: str) -> None:
        """Raises ValueError if `text` is not in the format of Prometheus."""
        self._values: dict[str, float] = {}
        self.by_label: dict[str, dict[str, float]] = {}
        """Values of metrics with one label, by the label's value."""
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if not sample.labels:
                    self._values[sample.name] = sample.value
                elif len(sample.labels) == 1:
                    (label,) = sample.labels.values()
                    self.by_label.setdefault(sample.name, {})[label] = sample.value

    def __getitem__(self, name: str) -> float:
        """Returns the value of `paceline_<name>`; 0 if the server has no such metric."""
        return self._values.get(f"paceline_{name}", 0.0)

    def labelled(self, name: str) -> Mapping[str, float]:
        """Returns the values of `paceline_<name>` by the value of its label."""
        return self.by_label.get(f"paceline_{name}", {})


class ServerSample(Struct, frozen=True):
    """The slots and metrics of a server at one time."""

    seconds: float
    """Time on a monotonic clock."""
    slots: list[ListedSlot] | None
    """None if the server's GET /slots is off."""
    metrics: Metrics


def read_sample(client: ServerClient) -> ServerSample:
    """Returns the current state of the server. Raises ServerError."""
    slots: list[ListedSlot] | None = None
    try:
        slots = client.get_as("/slots", list[ListedSlot])
    except ServerError as error:
        if error.status != _DISABLED:
            raise
    try:
        metrics = Metrics(client.get("/metrics"))
    except ValueError as error:
        raise ServerError(f"{client.url}/metrics cannot be read: {error}") from None
    return ServerSample(time.monotonic(), slots, metrics)
