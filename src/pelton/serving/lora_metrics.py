"""Which adapters run and which wait, under vLLM's name: gateways send requests where their adapter is at work."""

from __future__ import annotations

import time
from collections.abc import Iterable

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from pelton.core.events import EventKind
from pelton.engine.client import EngineClient
from pelton.engine.wire import EngineUpdate


class LoraMetrics(Collector):
    """Follows the sequences of requests that have an adapter; others cost nothing."""

    def __init__(self, client: EngineClient, labels: dict[str, str]) -> None:
        self._client = client
        self._labels = labels
        self._names: dict[str, str] = {}  # of submissions
        self._running: dict[str, str] = {}  # sequence -> its submission
        self._waiting: dict[str, str] = {}
        self._changed_s = time.time()

    def begin(self, name: str, submission_id: str, num_sequences: int) -> None:
        """A submission that runs with the adapter called `name`."""
        self._names[submission_id] = name
        sequences = (
            [f"{submission_id}#{index}" for index in range(num_sequences)] if num_sequences > 1 else [submission_id]
        )
        self._waiting.update(dict.fromkeys(sequences, submission_id))
        self._changed_s = time.time()

    def take_update(self, update: EngineUpdate) -> None:
        """Listener of `EngineClient`."""
        if not self._names:
            return
        for event in update.events:
            sequence = event.request_id
            submission_id = self._running.get(sequence) or self._waiting.get(sequence)
            if submission_id is None or event.kind not in (
                EventKind.SCHEDULED,
                EventKind.PREEMPTED,
                EventKind.FINISHED,
            ):
                continue
            self._running.pop(sequence, None)
            self._waiting.pop(sequence, None)
            if event.kind is EventKind.SCHEDULED:
                self._running[sequence] = submission_id
            elif event.kind is EventKind.PREEMPTED:
                self._waiting[sequence] = submission_id
            self._changed_s = time.time()
        self._forget_ended()

    def _forget_ended(self) -> None:
        """Those without a sequence, and those that an engine took with it when it died."""
        alive = {*self._running.values(), *self._waiting.values()}
        for submission_id in [each for each in self._names if each not in alive]:
            del self._names[submission_id]

    def collect(self) -> Iterable[GaugeMetricFamily]:
        labels = [*self._labels, "max_lora", "waiting_lora_adapters", "running_lora_adapters"]
        family = GaugeMetricFamily(
            "vllm:lora_requests_info", "Adapters of requests; the time of the last change", labels=labels
        )
        if self._client.info is not None and self._client.adapters:
            for states in (self._running, self._waiting):
                for sequence in [each for each, submission in states.items() if not self._client.is_open(submission)]:
                    del states[sequence]
            waiting, running = (
                ",".join(sorted({self._names[submission] for submission in states.values()}))
                for states in (self._waiting, self._running)
            )
            values = [*self._labels.values(), str(self._client.info.max_loras), waiting, running]
            family.add_metric(values, self._changed_s)
        yield family
