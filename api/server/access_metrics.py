"""Metrics of the access to the server: responses, connections, and the requests of API keys with names."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from api.generation.loaded_model import AppState
from api.http.response_counts import ResponseCounts


class AccessCollector(Collector):
    """Collects the metrics at each scrape. Only keys of the file of `--keys` have names, so labels are bounded."""

    def __init__(self, state: AppState) -> None:
        self._state = state

    def collect(self) -> Iterator[Metric]:
        """Yields all metric families."""
        yield from _response_metrics(self._state.responses)
        errors = CounterMetricFamily(
            "paceline_http_errors",
            "Responses with an error, by status, type and code; 499 is a client that disconnected",
            labels=("status", "type", "code"),
        )
        for (status, kind, code), count in sorted(self._state.errors.items()):
            errors.add_metric([str(status), kind, code], count)
        yield errors
        if (named := self._state.keys.named) and self._state.loaded is not None:
            owners = self._state.loaded.engine.stats().owners
            requests = GaugeMetricFamily(
                "paceline_key_requests", "Requests that occupy a slot or wait, by API key", labels=("key", "state")
            )
            for name, use in sorted(named.items()):
                for state, count in zip(("running", "waiting"), owners.get(use.key.owner, (0, 0)), strict=True):
                    requests.add_metric([name, state], count)
            yield requests


def _response_metrics(counts: ResponseCounts) -> Iterator[Metric]:
    responses = CounterMetricFamily(
        "paceline_http_requests",
        "Responses by method, route and status; `other` is every path without a route",
        labels=("method", "route", "status"),
    )
    for (method, route, status), count in sorted(counts.responses.items()):
        responses.add_metric([method, route, str(status)], count)
    yield responses
    failed = "Streams that ended with an error event"
    yield CounterMetricFamily("paceline_http_failed_streams", failed, value=counts.failed_streams)
    yield GaugeMetricFamily("paceline_http_connections", "Open connections", value=counts.open_connections())
