"""The histogram that tokens are counted in, beside the library's own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.exposition import generate_latest

from pelton.serving.histogram import BucketCounts

BUCKETS = (0.01, 0.5, 1, 20)


def lines(registry: CollectorRegistry) -> list[str]:
    return [line for line in generate_latest(registry).decode().splitlines() if "_created" not in line]


def test_exposed_as_the_library_exposes_its_own() -> None:
    own, theirs = CollectorRegistry(), CollectorRegistry()
    counts = BucketCounts("wait_seconds", "How long", {"model_name": "m"}, BUCKETS)
    own.register(counts)
    expected = Histogram("wait_seconds", "How long", ("model_name",), registry=theirs, buckets=BUCKETS).labels("m")
    for value in (0.0, 0.01, 0.010001, 0.5, 1.0, 7.0, 20.0, 20.5, 1e9):
        counts.observe(value)
        expected.observe(value)
    counts.observe_parts(1.5, 3)  # three of 0.5
    for _ in range(3):
        expected.observe(0.5)
    assert lines(own) == lines(theirs)
