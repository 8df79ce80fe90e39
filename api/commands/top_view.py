"""The view of `paceline top`: samples of a server as lines and tables."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from api.commands.server_client import without_controls
from api.commands.top_sample import ListedSlot, ServerFacts, ServerSample

# Number of samples whose rates are drawn.
_HISTORY = 60
_BLOCKS = "▁▂▃▄▅▆▇█"
_BAR_CHARS = 20
_MIB, _GIB = 2**20, 2**30


class ServerHistory:
    """The latest two samples of a server, and its tokens per second in the samples before."""

    def __init__(self) -> None:
        self._before: ServerSample | None = None
        self._now: ServerSample | None = None
        self.rates: deque[float] = deque(maxlen=_HISTORY)

    @property
    def now(self) -> ServerSample | None:
        """The latest sample. None before the first one."""
        return self._now

    def add(self, sample: ServerSample) -> None:
        """Appends a sample. A counter below that of the last sample means a new server, and clears the history."""
        if self._now is not None and sample.metrics["steps_total"] < self._now.metrics["steps_total"]:
            self._now = None
            self.rates.clear()
        self._before, self._now = self._now, sample
        if self._before is not None:
            self.rates.append(self.rate("completion_tokens_total"))

    def gain(self, name: str) -> float:
        """Returns the growth of a counter between the two samples; 0 with one sample."""
        return self._now.metrics[name] - self._before.metrics[name] if self._before and self._now else 0.0

    def rate(self, name: str) -> float:
        """Returns the growth of a counter per second; 0 with one sample."""
        return self.gain(name) / self._seconds if self._seconds else 0.0

    def slot_rate(self, slot: ListedSlot) -> float:
        """Returns the tokens per second of `slot`, which must be one of the latest sample."""
        if not self._seconds or self._before is None:
            return 0.0
        same = (old.decoded for old in self._before.slots or () if (old.id, old.id_task) == (slot.id, slot.id_task))
        return max(0.0, slot.decoded - next(same, 0)) / self._seconds

    @property
    def _seconds(self) -> float:
        return self._now.seconds - self._before.seconds if self._before and self._now else 0.0


def server_view(url: str, facts: ServerFacts, history: ServerHistory, problem: str = "") -> RenderableType:
    """Returns the view of the latest sample, with a line about a `problem` of the connection if there is one."""
    name = without_controls(facts.model_alias) or "model"
    version = without_controls(facts.build_info).partition(",")[0]
    title = " · ".join(filter(None, (name, url, version, "deterministic" if facts.deterministic else "")))
    parts: list[RenderableType] = [Text(title, "bold")]
    if problem:
        parts.append(Text(problem, "red"))
    if (sample := history.now) is not None:
        parts += [*_lines(facts, sample, history), *_tables(sample, history)]
    return Group(*parts)


def _lines(facts: ServerFacts, sample: ServerSample, history: ServerHistory) -> Iterator[Text]:
    metrics = sample.metrics
    finished = {reason: count for reason, count in metrics.labelled("requests_total").items() if count}
    done = ", ".join(f"{count:.0f} {reason}" for reason, count in finished.items()) or "none"
    running, waiting = metrics["requests_running"], metrics["requests_waiting"]
    yield Text(f"requests   {running:.0f} running, {waiting:.0f} waiting · finished: {done}")
    out, prompt, cached = (history.rate(f"{kind}_tokens_total") for kind in ("completion", "prompt", "cached"))
    yield Text(f"tokens/s   {out:.1f} out, {prompt:.1f} prompt ({cached:.1f} cached) {sparkline(history.rates)}")
    steps = history.gain("steps_total")
    milliseconds = f"{1e3 * history.gain('busy_seconds_total') / steps:.1f} ms" if steps else "idle"
    yield Text(f"step       {milliseconds}, {history.rate('steps_total'):.1f} steps/s")
    used, idle, cells = metrics["cells_used"], metrics["cells_idle"], metrics["cells"]
    layout = "unified" if facts.memory.kv_unified else "per slot"
    yield Text(
        f"KV cells   {bar(used, cells)} {_percent(used, cells)} of {cells:.0f} ({layout}), "
        f"{_percent(idle, cells)} idle prefixes"
    )
    memory, ram, disk = facts.memory, metrics["prefix_ram_bytes"], metrics["prefix_disk_bytes"]
    yield Text(f"KV in RAM  {bar(ram, memory.ram_bytes)} {_size(ram)} of {_size(memory.ram_bytes)}")
    if memory.disk_bytes:
        yield Text(f"KV on disk {bar(disk, memory.disk_bytes)} {_size(disk)} of {_size(memory.disk_bytes)}")


def _tables(sample: ServerSample, history: ServerHistory) -> Iterator[RenderableType]:
    if sample.slots is None:
        yield Text("slots      GET /slots is off (--no-slots)")
    else:
        yield slot_table(sample.slots, history)
    if proposers := proposer_table(sample):
        yield proposers


def slot_table(slots: list[ListedSlot], history: ServerHistory) -> Table:
    """Returns a table with a row for each slot."""
    table = _table("slot", "state", "prompt", "cached", "out", "tokens/s", "draft", "accepted", "context")
    for slot in slots:
        if not slot.is_processing:
            table.add_row(str(slot.id), "idle", *[""] * 6, _percent(slot.n_prompt_tokens, slot.n_ctx), style="dim")
            continue
        computed = slot.n_prompt_tokens_cache + slot.n_prompt_tokens_processed
        is_prefilling = slot.decoded == 0 and computed < slot.prompt_tokens
        drafted, accepted = sum(each.drafted for each in slot.drafts), sum(each.accepted for each in slot.drafts)
        table.add_row(
            str(slot.id),
            Text(f"prefill {_percent(computed, slot.prompt_tokens)}", "yellow")
            if is_prefilling
            else Text("decode", "green"),
            str(slot.prompt_tokens),
            str(slot.n_prompt_tokens_cache),
            str(slot.decoded),
            f"{history.slot_rate(slot):.1f}",
            str(slot.n_draft or ""),
            f"{accepted}/{drafted} {_percent(accepted, drafted)}" if drafted else "",
            _percent(slot.n_prompt_tokens, slot.n_ctx),
        )
    return table


def proposer_table(sample: ServerSample) -> Table | None:
    """Returns a table with a row for each type of proposer that has drafted; None if none has."""
    metrics = sample.metrics
    drafted, accepted = metrics.labelled("spec_draft_tokens_total"), metrics.labelled("spec_accepted_tokens_total")
    drafts, chance = metrics.labelled("spec_drafts_total"), metrics.labelled("spec_chance")
    saved, spent = metrics.labelled("spec_saved_seconds_total"), metrics.labelled("spec_spent_seconds_total")
    table = _table("proposer", "drafts", "drafted", "accepted", "", "chance", "saved s", "spent s", "gain s")
    for name in sorted(drafted, key=lambda kind: -accepted.get(kind, 0)):
        if not drafted[name]:
            continue
        hits, won, lost = accepted.get(name, 0), saved.get(name, 0), spent.get(name, 0)
        table.add_row(
            without_controls(name),
            f"{drafts.get(name, 0):.0f}",
            f"{drafted[name]:.0f}",
            f"{hits:.0f}",
            _percent(hits, drafted[name]),
            _percent(chance.get(name, 0), 1),
            f"{won:.2f}",
            f"{lost:.2f}",
            Text(f"{won - lost:+.2f}", "green" if won > lost else "red"),
        )
    return table if table.row_count else None


def sparkline(values: deque[float]) -> str:
    """Returns a block for each value, relative to the largest one."""
    top = max(values, default=0.0)
    return "".join(_BLOCKS[round(value / top * (len(_BLOCKS) - 1))] if top else _BLOCKS[0] for value in values)


def bar(part: float, whole: float) -> str:
    """Returns a bar of `_BAR_CHARS` characters."""
    filled = round(_BAR_CHARS * min(1.0, part / whole)) if whole else 0
    return "█" * filled + "░" * (_BAR_CHARS - filled)


def _table(first: str, *columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(first)
    for name in columns:
        table.add_column(name, justify="left" if name == "state" else "right", no_wrap=True)
    return table


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f}%" if whole else "–"


def _size(count: float) -> str:
    return f"{count / _GIB:.1f} GiB" if count >= _GIB else f"{count / _MIB:.1f} MiB"
