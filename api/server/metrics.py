"""GET /metrics: the engine's statistics for Prometheus, partly also under vLLM's metric names."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from api.generation.loaded_model import PACELINE_VERSION, LoadedModel
from api.schema.speculation_stats import by_position
from api.server.metric_families import histogram_of, labelled_counter
from api.server.vllm_metrics import draft_metrics, vllm_metrics
from engine import Engine, Stats

# Fields of Stats, each with the name of its metric after `paceline_` and the help text.
_COUNTERS = {
    "prompt_tokens": ("prompt_tokens", "Prompt tokens, cached tokens included"),
    "cached_tokens": ("cached_tokens", "Prompt tokens found in the prefix cache"),
    "completion_tokens": ("completion_tokens", "Tokens emitted"),
    "drafted_tokens": ("drafted_tokens", "Draft tokens verified"),
    "accepted_tokens": ("accepted_tokens", "Draft tokens accepted"),
    "steps": ("steps", "Engine steps"),
    "native_passes": ("native_passes", "Forward passes over the weights"),
    "preemptions": ("retractions", "Requests preempted because KV cells ran out"),
    "displacements": ("displacements", "Requests that yielded their slot to another owner or a higher priority"),
    "restores": ("restores", "Requests that loaded prompt tokens from RAM or disk"),
    "hits": ("hits", "Requests with a cached prefix"),
    "saved_tokens": ("saved_tokens", "Tokens whose KV was saved to RAM"),
    "restored_tokens": ("restored_tokens", "Tokens whose KV was loaded from RAM or disk"),
    "busy_seconds": ("busy_seconds", "Seconds spent in engine steps"),
    "native_seconds": ("native_seconds", "Seconds of engine steps spent in the native library"),
}
_GAUGES = {
    "running": ("requests_running", "Requests that occupy a slot"),
    "waiting": ("requests_waiting", "Requests in the queue"),
    "cells_used": ("cells_used", "KV cells in use"),
    "cells_idle": ("cells_idle", "KV cells with cached prefixes that no running request uses"),
    "cells": ("cells", "KV cells in total"),
    "ram_bytes": ("prefix_ram_bytes", "Bytes of prefixes in RAM"),
    "disk_bytes": ("prefix_disk_bytes", "Bytes of prefixes on disk"),
}
_HISTOGRAMS = {
    "ttft": ("time_to_first_token_seconds", "Seconds from submission to the first token"),
    "gap": ("inter_token_seconds", "Seconds between two consecutive steps that emit tokens of the same request"),
    "queue": ("queue_seconds", "Seconds from submission to the first step"),
    "step": ("step_duration_seconds", "Seconds of an engine step with a decode"),
    "grammar": ("grammar_compile_seconds", "Seconds of the compilation of a grammar that was not cached"),
}


class EngineCollector(Collector):
    """Collects the metrics of one snapshot of the engine's statistics at each scrape."""

    def __init__(self, engine: Engine, model_name: str) -> None:
        self._engine = engine
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        """Yields all metric families."""
        stats = self._engine.stats()
        build = GaugeMetricFamily("paceline_build_info", "The version of Paceline; always 1", labels=["version"])
        build.add_metric([PACELINE_VERSION], 1)
        yield build
        yield from _engine_metrics(stats)
        yield from _speculation_metrics(stats)
        yield from _step_metrics(stats)
        yield from _embedding_metrics(stats)
        yield from vllm_metrics(stats, self._model_name)
        yield from _llama_server_metrics(stats)


def metrics_registry(model: LoadedModel) -> CollectorRegistry:
    """Returns a registry with the metrics of the model's engine, and the memory, CPU time and open files of this
    process and, if there is one, of the engine's process."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(EngineCollector(model.engine, model.name))
    ProcessCollector(registry=registry)
    if (engine_process := model.engine.process_id) is not None:
        ProcessCollector("paceline_engine", pid=lambda: engine_process, registry=registry)
    return registry


def _engine_metrics(stats: Stats) -> Iterator[Metric]:
    requests = labelled_counter("paceline_requests", "Requests finished, by reason", "reason")
    for reason, count in stats.requests_finished.items():
        requests.add_metric([reason], count)
    yield requests
    for field, (name, help_text) in _COUNTERS.items():
        yield CounterMetricFamily(f"paceline_{name}", help_text, value=getattr(stats, field))
    for field, (name, help_text) in _GAUGES.items():
        yield GaugeMetricFamily(f"paceline_{name}", help_text, value=getattr(stats, field))
    for field, (name, help_text) in _HISTOGRAMS.items():
        yield histogram_of(f"paceline_{name}", help_text, getattr(stats, field))


def _speculation_metrics(stats: Stats) -> Iterator[Metric]:
    drafts = labelled_counter("paceline_spec_drafts", "Drafts verified, by proposer type", "type")
    drafted = labelled_counter("paceline_spec_draft_tokens", "Draft tokens verified, by proposer type", "type")
    accepted = labelled_counter("paceline_spec_accepted_tokens", "Draft tokens accepted, by proposer type", "type")
    positions = labelled_counter(
        "paceline_spec_accepted_tokens_per_pos",
        "Draft tokens accepted, by proposer type and position in the draft",
        "type",
        "position",
    )
    chance = GaugeMetricFamily(
        "paceline_spec_chance", "Estimated acceptance rate of the next draft's first token", labels=["type"]
    )
    estimates = {
        "expected": labelled_counter("paceline_spec_expected_tokens", "Draft tokens expected to be accepted", "type"),
        "saved": labelled_counter(
            "paceline_spec_saved_seconds", "Seconds of decoding saved by accepted draft tokens", "type"
        ),
        "spent": labelled_counter(
            "paceline_spec_spent_seconds", "Seconds spent on proposing and verifying drafts", "type"
        ),
    }
    failures = labelled_counter(
        "paceline_spec_failures", "Requests whose proposer was switched off after an exception", "type"
    )
    for each in stats.drafts:
        failures.add_metric([each.type], each.failures)
        drafts.add_metric([each.type], sum(each.by_accepted))
        drafted.add_metric([each.type], each.drafted)
        accepted.add_metric([each.type], each.accepted)
        for position, count in enumerate(by_position(each.by_accepted)):
            positions.add_metric([each.type, str(position)], count)
        chance.add_metric([each.type], each.chance)
        for field, family in estimates.items():
            family.add_metric([each.type], getattr(each, field))
    yield from (drafts, drafted, accepted, positions, chance, failures, *estimates.values())


def _step_metrics(stats: Stats) -> Iterator[Metric]:
    seconds = GaugeMetricFamily(
        "paceline_step_seconds", "Estimated seconds of a decode step, by number of rows", labels=["rows"]
    )
    for rows, estimate in stats.step_seconds.items():
        seconds.add_metric([str(rows)], estimate)
    yield seconds


def _embedding_metrics(stats: Stats) -> Iterator[Metric]:
    done = stats.embeddings
    yield CounterMetricFamily("paceline_embedding_inputs", "Inputs embedded or scored", value=done.inputs)
    yield CounterMetricFamily("paceline_embedding_tokens", "Tokens of these inputs", value=done.tokens)
    yield CounterMetricFamily("paceline_embedding_decodes", "Decodes of the embedding thread", value=done.decodes)


def _llama_server_metrics(stats: Stats) -> Iterator[Metric]:
    """Yields llama-server's metrics. Its rates are those since the last scrape, these are those since the start.

    As in llama-server, embeddings count as prompts. The maximum `n_tokens_max` is a gauge here and a counter there.
    """
    prompt_rate = _ratio(stats.prefilled_tokens, stats.prefill_seconds)
    output_rate = _ratio(stats.completion_tokens - sum(stats.ttft.counts), stats.gap.sum)
    counters = {
        "prompt_tokens": ("Prompt tokens computed", stats.prefilled_tokens + stats.embeddings.tokens),
        "prompt_tokens_cached": ("Prompt tokens found in the prefix cache", stats.cached_tokens),
        "prompt_seconds": ("Seconds from the start to the first token of requests", stats.prefill_seconds),
        "tokens_predicted": ("Tokens emitted", stats.completion_tokens),
        "tokens_predicted_seconds": ("Seconds between the steps that emit tokens of a request", stats.gap.sum),
        "n_decode": ("Decodes", stats.steps + stats.embeddings.decodes),
    }
    for name, (help_text, value) in counters.items():
        yield CounterMetricFamily(f"llamacpp:{name}", help_text, value=value)
    yield from draft_metrics("llamacpp:", stats, {})
    gauges = {
        "n_tokens_max": ("Most tokens of prompt and output of one request", stats.longest_sequence),
        "prompt_tokens_seconds": ("Prompt tokens computed per second", prompt_rate),
        "predicted_tokens_seconds": ("Tokens after the first per second of a request", output_rate),
        "requests_processing": ("Requests that occupy a slot", stats.running),
        "requests_deferred": ("Requests in the queue", stats.waiting),
        "n_busy_slots_per_decode": ("Mean number of sequences in a step", _ratio(stats.busy_slots, stats.steps)),
    }
    for name, (help_text, value) in gauges.items():
        yield GaugeMetricFamily(f"llamacpp:{name}", help_text, value=value)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
