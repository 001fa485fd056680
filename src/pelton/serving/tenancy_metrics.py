"""Metrics by tenant, from what the engine tells when somebody looks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from pelton.core.session import TenancyStats

# (metric, where in `TenancyStats`, field, help). Those of tenants that share a label are added up.
_GAUGES = (
    ("pelton:tenant_requests_running", "service", "num_running", "Requests in the running batch"),
    ("pelton:tenant_requests_waiting", "service", "num_waiting", "Requests that wait for admission"),
    ("pelton:tenant_sessions", "tenants", "num_sessions", "Sessions remembered"),
    ("pelton:tenant_pinned_blocks", "tenants", "num_pinned_blocks", "KV blocks kept for sessions between their turns"),
)
_COUNTERS = (
    ("pelton:tenant_service", "service", "service", "Prompt tokens computed and twice the output tokens"),
    ("pelton:tenant_pinned_block_seconds", "tenants", "pinned_block_s_total", "KV blocks times seconds pinned"),
)


class TenancyMetrics(Collector):
    """`label_of` bounds the tenants that are told apart."""

    def __init__(self, labels: dict[str, str], label_of: Callable[[str], str]) -> None:
        self.stats = TenancyStats()
        self._labels = labels
        self._label_of = label_of

    def collect(self) -> Iterable[GaugeMetricFamily | CounterMetricFamily]:
        names, values = list(self._labels), list(self._labels.values())
        stats = self.stats
        for kind, rows in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for name, part, field, text in rows:
                family = kind(name, text, labels=[*names, "tenant"])
                for tenant, value in self._sums(part, field).items():
                    family.add_metric([*values, tenant], value)
                yield family
        for name, value, text in (
            ("pelton:fairness_gap", stats.fairness_gap, "Largest difference in service between tenants who wait"),
            ("pelton:sessions", stats.num_sessions, "Sessions remembered, over all tenants"),
            ("pelton:pins", stats.num_pins, "Turns whose KV is kept"),
        ):
            gauge = GaugeMetricFamily(name, text, labels=names)
            gauge.add_metric(values, value)
            yield gauge
        ended = CounterMetricFamily("pelton:pins_ended", "Pins that have ended", labels=[*names, "reason"])
        for reason, number in stats.num_pins_ended_total:
            ended.add_metric([*values, reason], number)
        yield ended

    def _sums(self, part: str, field: str) -> dict[str, float]:
        sums: dict[str, float] = defaultdict(float)
        for tenant in getattr(self.stats, part):
            sums[self._label_of(tenant.tenant_id)] += getattr(tenant, field)
        return sums
