"""Constructors of Prometheus' metric families."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from engine import Histogram

Labels = Mapping[str, str]
_NO_LABELS: Labels = {}


def gauge(name: str, help_text: str, value: float, labels: Labels = _NO_LABELS) -> GaugeMetricFamily:
    """Returns a gauge with one sample."""
    family = GaugeMetricFamily(name, help_text, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def counter(name: str, help_text: str, value: float, labels: Labels = _NO_LABELS) -> CounterMetricFamily:
    """Returns a counter with one sample."""
    family = CounterMetricFamily(name, help_text, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def labelled_counter(name: str, help_text: str, *labels: str) -> CounterMetricFamily:
    """Returns a counter without samples."""
    return CounterMetricFamily(name, help_text, labels=labels)


def histogram_of(name: str, help_text: str, histogram: Histogram, labels: Labels = _NO_LABELS) -> HistogramMetricFamily:
    """Returns a histogram with one set of buckets."""
    bounds: Iterable[str] = (*map(str, histogram.bounds), "+Inf")
    buckets = list(zip(bounds, accumulate(histogram.counts), strict=True))
    family = HistogramMetricFamily(name, help_text, labels=list(labels))
    family.add_metric(list(labels.values()), buckets, histogram.sum)
    return family
