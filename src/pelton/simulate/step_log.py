"""The shapes of a live engine's steps and how long they took: what a cost function is fitted to."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path

import msgspec

from pelton.core.batch import ScheduledBatch, StepResult
from pelton.core.errors import ConfigError
from pelton.core.protocols import Executor
from pelton.simulate.cost import StepShape, shape_of


class MeasuredStep(msgspec.Struct, frozen=True):
    shape: StepShape
    elapsed_s: float


class StepLogExecutor:
    """Implements `Executor`: passes steps on, and writes one JSON line for each when it is done."""

    def __init__(self, executor: Executor, path: Path, block_size: int) -> None:
        try:
            self._file = path.open("wb")
        except OSError as error:
            raise ConfigError(f"step_log: {path} cannot be written: {error.strerror}") from error
        self._executor = executor
        self._block_size = block_size
        self._encode = msgspec.json.Encoder().encode

    def submit(self, batch: ScheduledBatch) -> Future[StepResult]:
        shape = shape_of(batch, self._block_size)
        future = self._executor.submit(batch)
        future.add_done_callback(lambda done: self._write(shape, done))
        return future

    def _write(self, shape: StepShape, done: Future[StepResult]) -> None:
        if not done.cancelled() and done.exception() is None and not self._file.closed:
            self._file.write(self._encode(MeasuredStep(shape, done.result().elapsed_s)) + b"\n")

    def close(self) -> None:
        self._executor.close()
        self._file.close()


def read_step_log(paths: Iterable[Path]) -> list[MeasuredStep]:
    """In order. Raises `ConfigError`."""
    steps: list[MeasuredStep] = []
    for path in paths:
        try:
            lines = path.read_bytes().split(b"\n")
            steps += [msgspec.json.decode(line, type=MeasuredStep) for line in lines[:-1]]  # the last may be cut off
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
        except msgspec.DecodeError as error:
            raise ConfigError(f"{path}: is not a step log: {error}") from error
    return steps
