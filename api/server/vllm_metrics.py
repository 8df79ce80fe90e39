"""The engine's statistics under vLLM's metric names, which routers, autoscalers and dashboards read."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.metrics_core import Metric

from api.schema.speculation_stats import by_accepted, by_position
from api.server.metric_families import Labels, counter, gauge, histogram_of, labelled_counter
from engine import BLOCK_TOKENS, Stats

# vLLM's words for the reasons of the engine.
_FINISHED_REASONS = {"cancelled": "abort"}


def vllm_metrics(stats: Stats, model_name: str) -> Iterator[Metric]:
    """Yields vLLM's metrics, with its labels `model_name` and `engine`, also under older names that routers read."""
    labels = {"engine": "0", "model_name": model_name}
    yield gauge("vllm:num_requests_running", "Requests that occupy a slot", stats.running, labels)
    yield gauge("vllm:num_requests_waiting", "Requests in the queue", stats.waiting, labels)
    yield from _cache_metrics(stats, labels)
    yield counter("vllm:prompt_tokens", "Prompt tokens", stats.prompt_tokens, labels)
    yield counter("vllm:generation_tokens", "Tokens emitted", stats.completion_tokens, labels)
    yield counter("vllm:num_preemptions", "Requests preempted because KV cells ran out", stats.preemptions, labels)
    finished = labelled_counter("vllm:request_success", "Requests finished, by reason", *labels, "finished_reason")
    for reason, count in stats.requests_finished.items():
        finished.add_metric([*labels.values(), _FINISHED_REASONS.get(reason, reason)], count)
    yield finished
    ttft, gap = "Seconds from submission to the first token", "Seconds between two steps of a request that emit tokens"
    yield histogram_of("vllm:time_to_first_token_seconds", ttft, stats.ttft, labels)
    yield histogram_of("vllm:inter_token_latency_seconds", gap, stats.gap, labels)
    queue = "Seconds from submission to the first step"
    yield histogram_of("vllm:request_queue_time_seconds", queue, stats.queue, labels)
    yield from draft_metrics("vllm:", stats, labels)


def _cache_metrics(stats: Stats, labels: Labels) -> Iterator[Metric]:
    used = (stats.cells_used - stats.cells_idle) / stats.cells if stats.cells else 0.0
    for name in ("kv_cache", "gpu_cache"):
        yield gauge(f"vllm:{name}_usage_perc", "Share of KV cells in use by requests, 0 to 1", used, labels)
    for name in ("prefix_cache", "gpu_prefix_cache"):
        yield counter(f"vllm:{name}_queries", "Prompt tokens, cached tokens included", stats.prompt_tokens, labels)
        yield counter(f"vllm:{name}_hits", "Prompt tokens found in the prefix cache", stats.cached_tokens, labels)
    config = {"block_size": str(BLOCK_TOKENS), "num_gpu_blocks": str(stats.cells // BLOCK_TOKENS)}
    info = "Tokens of a KV block and number of blocks; always 1"
    yield gauge("vllm:cache_config_info", info, 1, {**labels, **config})


def draft_metrics(prefix: str, stats: Stats, labels: Labels) -> Iterator[Metric]:
    """Yields the metrics of speculative decoding that vLLM and llama-server name alike."""
    counts, drafted = by_accepted(stats.drafts), sum(each.drafted for each in stats.drafts)
    accepted = sum(each.accepted for each in stats.drafts)
    name = f"{prefix}spec_decode_num"
    yield counter(f"{name}_drafts", "Drafts verified", sum(counts), labels)
    yield counter(f"{name}_draft_tokens", "Draft tokens verified", drafted, labels)
    yield counter(f"{name}_accepted_tokens", "Draft tokens accepted", accepted, labels)
    help_text = "Draft tokens accepted, by position in the draft"
    positions = labelled_counter(f"{name}_accepted_tokens_per_pos", help_text, *labels, "position")
    for position, count in enumerate(by_position(counts)):
        positions.add_metric([*labels.values(), str(position)], count)
    yield positions
