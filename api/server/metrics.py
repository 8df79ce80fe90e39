"""GET /metrics: the engine's counts for Prometheus, and the names of vLLM that dashboards and load tools look for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from api.generation.loaded_model import VERSION, Core
from api.schema.drafts import by_accepted, by_position
from engine import Histogram, Stats

_COUNTERS = {
    "prompt_tokens": "Tokens of prompts, cached ones included",
    "cached_tokens": "Tokens of prompts that needed no computing",
    "completion_tokens": "Tokens picked",
    "drafted_tokens": "Draft tokens verified",
    "accepted_tokens": "Draft tokens that were right",
    "steps": "Steps of the engine",
    "native_passes": "Passes over the weights",
    "retractions": "Preemptions of requests for lack of KV cells",
    "restores": "Times that a request began with tokens loaded from RAM or disk",
    "hits": "Requests whose prompt had a cached prefix",
    "saved_tokens": "Tokens of KV saved to RAM",
    "restored_tokens": "Tokens of KV loaded from RAM or disk",
    "busy_seconds": "Seconds spent in steps",
    "native_seconds": "Seconds of these inside the native library",
}
_GAUGES = {
    "running": ("requests_running", "Requests that have a slot"),
    "waiting": ("requests_waiting", "Requests that wait for one"),
    "cells_used": ("cells_used", "KV cells in use"),
    "cells_idle": ("cells_idle", "KV cells in use by idle prefixes only"),
    "cells": ("cells", "KV cells"),
    "ram_bytes": ("prefix_ram_bytes", "Bytes of prefixes in RAM"),
    "disk_bytes": ("prefix_disk_bytes", "Bytes of prefixes on disk"),
}
_HISTOGRAMS = {
    "ttft": ("time_to_first_token_seconds", "Seconds from submission to the first token"),
    "gap": ("inter_token_seconds", "Seconds between one step with tokens of a request and the next"),
    "queue": ("queue_seconds", "Seconds from submission to the first step"),
}


class EngineCollector(Collector):
    """Reads the engine's counts at each scrape."""

    def __init__(self, engine: Core) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """All families, from one snapshot."""
        stats = self._engine.stats()
        build = GaugeMetricFamily("paceline_build_info", "Always 1", labels=["version"])
        build.add_metric([VERSION], 1)
        yield build
        yield from _own(stats)
        yield from _drafts(stats)
        yield from _steps(stats)
        yield from _of_vllm(stats)


def registry_of(engine: Core) -> CollectorRegistry:
    """A registry with the engine's counts and this process's memory, CPU time and files."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(EngineCollector(engine))
    ProcessCollector(registry=registry)
    return registry


def _own(stats: Stats) -> Iterator[Metric]:
    requests = CounterMetricFamily("paceline_requests", "Requests that came to an end, by how", labels=["reason"])
    for reason, count in stats.requests_finished.items():
        requests.add_metric([reason], count)
    yield requests
    for field, help_text in _COUNTERS.items():
        yield CounterMetricFamily(f"paceline_{field}", help_text, value=getattr(stats, field))
    for field, (name, help_text) in _GAUGES.items():
        yield GaugeMetricFamily(f"paceline_{name}", help_text, value=getattr(stats, field))
    for field, (name, help_text) in _HISTOGRAMS.items():
        yield _histogram(f"paceline_{name}", help_text, getattr(stats, field))


def _drafts(stats: Stats) -> Iterator[Metric]:
    made = _counter("paceline_spec_drafts", "Drafts verified", "type")
    drafted = _counter("paceline_spec_draft_tokens", "Tokens of drafts verified", "type")
    accepted = _counter("paceline_spec_accepted_tokens", "Tokens of these that were right", "type")
    places = _counter("paceline_spec_accepted_tokens_per_pos", "The same by position in the draft", "type", "position")
    for drafts in stats.drafts:
        made.add_metric([drafts.type], sum(drafts.by_accepted))
        drafted.add_metric([drafts.type], drafts.drafted)
        accepted.add_metric([drafts.type], drafts.accepted)
        for position, count in enumerate(by_position(drafts.by_accepted)):
            places.add_metric([drafts.type, str(position)], count)
    yield from (made, drafted, accepted, places)
    chance = GaugeMetricFamily(
        "paceline_spec_chance", "The chance that the first token of the next draft is right", labels=["type"]
    )
    sums = {
        "expected": _counter(
            "paceline_spec_expected_tokens", "Tokens of drafts that were expected to be right", "type"
        ),
        "saved": _counter("paceline_spec_saved_seconds", "Seconds that the right ones would have taken", "type"),
        "spent": _counter("paceline_spec_spent_seconds", "Seconds that making and verifying them took", "type"),
    }
    for drafts in stats.drafts:
        chance.add_metric([drafts.type], drafts.chance)
        for name, family in sums.items():
            family.add_metric([drafts.type], getattr(drafts, name))
    yield from (chance, *sums.values())


def _steps(stats: Stats) -> Iterator[Metric]:
    seconds = GaugeMetricFamily("paceline_step_seconds", "What a decode of so many rows takes now", labels=["rows"])
    for rows, spent in stats.step_seconds.items():
        seconds.add_metric([str(rows)], spent)
    yield seconds


def _of_vllm(stats: Stats) -> Iterator[Metric]:
    yield GaugeMetricFamily("vllm:num_requests_running", "Requests that have a slot", value=stats.running)
    yield GaugeMetricFamily("vllm:num_requests_waiting", "Requests that wait for one", value=stats.waiting)
    used = (stats.cells_used - stats.cells_idle) / stats.cells if stats.cells else 0.0
    yield GaugeMetricFamily("vllm:kv_cache_usage_perc", "Share of cells that requests need, 0 to 1", value=used)
    yield CounterMetricFamily("vllm:prompt_tokens", "Tokens of prompts", value=stats.prompt_tokens)
    yield CounterMetricFamily("vllm:generation_tokens", "Tokens picked", value=stats.completion_tokens)
    yield _histogram("vllm:time_to_first_token_seconds", "Seconds to the first token", stats.ttft)
    counts, drafted = by_accepted(stats.drafts), sum(drafts.drafted for drafts in stats.drafts)
    accepted = sum(drafts.accepted for drafts in stats.drafts)
    yield CounterMetricFamily("vllm:spec_decode_num_drafts", "Drafts verified", value=sum(counts))
    yield CounterMetricFamily("vllm:spec_decode_num_draft_tokens", "Tokens of these", value=drafted)
    yield CounterMetricFamily("vllm:spec_decode_num_accepted_tokens", "Of these, the right ones", value=accepted)
    places = _counter("vllm:spec_decode_num_accepted_tokens_per_pos", "The same by position in the draft", "position")
    for position, count in enumerate(by_position(counts)):
        places.add_metric([str(position)], count)
    yield places


def _counter(name: str, help_text: str, *labels: str) -> CounterMetricFamily:
    return CounterMetricFamily(name, help_text, labels=labels)


def _histogram(name: str, help_text: str, histogram: Histogram) -> HistogramMetricFamily:
    bounds: Iterable[str] = (*map(str, histogram.bounds), "+Inf")
    buckets = list(zip(bounds, accumulate(histogram.counts), strict=True))
    return HistogramMetricFamily(name, help_text, buckets=buckets, sum_value=histogram.sum)
