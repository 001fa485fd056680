"""A histogram that costs a bisection per observation: some are made for every token."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import INF, floatToGoString


class BucketCounts(Collector):
    """Register it; not thread-safe. A value equal to a bound counts below it, as Prometheus wants."""

    def __init__(self, name: str, text: str, labels: dict[str, str], buckets: Sequence[float]) -> None:
        self._name = name
        self._text = text
        self._labels = labels
        self._bounds = list(buckets)
        self._counts = [0] * (len(buckets) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def observe_parts(self, total: float, count: int) -> None:
        """`count` equal values that add up to `total`."""
        self._counts[bisect_left(self._bounds, total / count)] += count
        self._sum += total

    def collect(self) -> Iterable[HistogramMetricFamily]:
        bounds = map(floatToGoString, (*self._bounds, INF))
        family = HistogramMetricFamily(self._name, self._text, labels=list(self._labels))
        family.add_metric(
            list(self._labels.values()), list(zip(bounds, accumulate(self._counts), strict=True)), self._sum
        )
        yield family
