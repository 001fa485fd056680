"""Steps of the production model runner on native kernels, each op timed: where every millisecond goes."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from pelton.bench.step_profile import StepPart, StepProfile, StepProfilePlan, median_step
from pelton.core.batch import PENDING_TOKEN_ID, KVOp, KVOpKind, RequestContext, ScheduledBatch, ScheduledRequest
from pelton.core.sampling_params import SamplingParams
from pelton.weights.config import ModelConfig
from pelton.weights.tensors import ModelFiles
from pelton.worker.config import WorkerConfig
from pelton.worker.executors.build_worker import load_weights
from pelton.worker.executors.host_resources import num_available_cores
from pelton.worker.forward_batch import Adapters, ForwardBatch
from pelton.worker.kernels.cpu.arrays import Floats, Ints
from pelton.worker.kernels.cpu.backend import NativeKernels
from pelton.worker.kernels.cpu.program import NativeProgram
from pelton.worker.kernels.cpu.sampler import NativeSampler
from pelton.worker.kernels.ops import AttentionShape, Forward, LayerCache
from pelton.worker.kv_storage import KVStorage
from pelton.worker.model_runner import ModelRunner
from pelton.worker.sampling.sampler import Samples, TokenMask

_BLOCK_SIZE = 16
_MIN_STEPS, _MAX_STEPS = 4, 64
_NUM_CONTEXTS = 4  # that are computed; further requests have copies
_CHUNK_TOKENS = 512
_GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)

_OUTSIDE_OPS = "native calls, outside ops"
_ARGMAX = "logits, greatest only"
_SAMPLING = "sampling"
_PYTHON = "Python: batch, bookkeeping"


class _Times:
    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()
        self.own_s = 0.0  # what timing took itself

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] += seconds
        self.calls[name] += 1

    def take(self, time_s: float) -> tuple[float, tuple[StepPart, ...]]:
        """Of a step that took `time_s` with its timing: the time without, and its parts; forgets them."""
        time_s -= self.own_s
        self.add(_PYTHON, time_s - sum(self.seconds.values()))
        parts = tuple(
            StepPart(name=name, num_calls=self.calls[name], time_s=seconds) for name, seconds in self.seconds.items()
        )
        self.seconds.clear()
        self.calls.clear()
        self.own_s = 0.0
        return time_s, parts


class _TimedProgram:
    """Implements `ops.Program`."""

    def __init__(self, program: NativeProgram, times: _Times) -> None:
        self._program = program
        self._times = times
        program.time_ops()

    def forward(self, batch: ForwardBatch, late_tokens: object = None, late_rows: object = None) -> None:
        del late_tokens, late_rows  # nothing is late on the host
        start_s = time.perf_counter()
        self._program.forward(batch)
        self._split(time.perf_counter() - start_s)

    def logits(self, rows: Ints, adapters: Adapters = ()) -> Floats:
        start_s = time.perf_counter()
        logits = self._program.logits(rows, adapters)
        self._split(time.perf_counter() - start_s)
        return logits

    def try_argmax(self, rows: Ints, adapters: Adapters = ()) -> list[int] | None:
        start_s = time.perf_counter()
        token_ids = self._program.try_argmax(rows, adapters)
        self._times.add(_ARGMAX, time.perf_counter() - start_s)
        return token_ids

    def hidden(self, first: int, num_rows: int) -> Floats:
        return self._program.hidden(first, num_rows)

    def _split(self, call_s: float) -> None:
        start_s, ops_s = time.perf_counter(), 0.0
        for label, seconds in self._program.take_times():
            if seconds > 0:
                self._times.add(label, seconds)
                ops_s += seconds
        self._times.add(_OUTSIDE_OPS, call_s - ops_s)
        self._times.own_s += time.perf_counter() - start_s


class _TimedSampler(NativeSampler):
    times: _Times

    def sample(
        self,
        logits: Floats,
        rows: Sequence[object],
        positions: Sequence[int],
        masks: Sequence[TokenMask | None] | None = None,
    ) -> Samples:
        start_s = time.perf_counter()
        samples = super().sample(logits, rows, positions, masks)  # type: ignore[arg-type]
        self.times.add(_SAMPLING, time.perf_counter() - start_s)
        return samples


class _TimedKernels(NativeKernels):
    def __init__(self, num_threads: int, isa: str | None, activation_dtype: str) -> None:
        super().__init__(num_threads, isa, activation_dtype=activation_dtype)
        self.times = _Times()

    def compile(  # type: ignore[override]
        self, model: Forward, shapes: Sequence[AttentionShape], caches: Sequence[LayerCache]
    ) -> _TimedProgram:
        return _TimedProgram(super().compile(model, shapes, caches), self.times)


def profile_steps(
    files: ModelFiles,
    configs: tuple[ModelConfig, WorkerConfig],
    plan: StepProfilePlan,
    text: Sequence[int],
    isa: str | None,
    on_progress: Callable[[str], None],
) -> tuple[str, list[StepProfile]]:
    """The kernels' name and the profiles. Raises `ConfigError` as `build_executor` does.

    `text`: token ids that requests have pieces of; none, where a tokenizer knows nothing of it: all ids in turn. Random
    ones would not do: what they make of a model's activations is tamer, and kernels have less work with it.
    """
    model_config, worker_config = configs
    kernels = _TimedKernels(worker_config.threads or num_available_cores(), isa, worker_config.activation_dtype)
    on_progress("loading")
    model = load_weights(files, model_config, worker_config, kernels)
    spec = files.spec
    num_positions = max(plan.context + _MAX_STEPS, *plan.prefill)
    blocks_per_table = -(-num_positions // _BLOCK_SIZE)
    num_tables = len(spec.kv_groups) * max(1, *plan.decode)
    kv = KVStorage(spec, 1 + num_tables * blocks_per_table, _BLOCK_SIZE, kernels.kv_dtypes[0], kernels)
    sampler = _TimedSampler(kernels.runtime, spec.vocab_size, ())
    sampler.times = kernels.times
    runner = ModelRunner(model, kv, sampler, block_size=_BLOCK_SIZE)
    steps = _Steps(plan, text or range(spec.vocab_size), len(spec.kv_groups), blocks_per_table)
    on_progress(f"contexts of {plan.context} tokens")
    for batch in steps.contexts():
        runner.run_step(batch)
    kernels.times.take(0.0)
    profiles = []
    for num_requests in plan.decode:
        on_progress(f"decode, {num_requests} requests")
        measured = _measure(runner, kernels.times, steps.decode(num_requests), plan.budget_s)
        profiles.append(median_step(f"decode after {plan.context} tokens", (num_requests, num_requests), measured))
    for num_tokens in plan.prefill:
        on_progress(f"prefill, {num_tokens} tokens")
        measured = _measure(runner, kernels.times, steps.prefill(num_tokens), plan.budget_s)
        profiles.append(median_step("prefill", (1, num_tokens), measured))
    return kernels.name, profiles


def _measure(
    runner: ModelRunner, times: _Times, batches: Iterator[ScheduledBatch], budget_s: float
) -> list[tuple[float, tuple[StepPart, ...]]]:
    measured = []
    end_s = time.perf_counter() + budget_s
    for batch in batches:
        start_s = time.perf_counter()
        runner.run_step(batch)
        measured.append(times.take(time.perf_counter() - start_s))
        if len(measured) >= _MIN_STEPS and time.perf_counter() > end_s:
            break
    return measured


class _Steps:
    """Batches as the scheduler makes them. Requests begin anew with every kind of step."""

    def __init__(self, plan: StepProfilePlan, text: Sequence[int], num_groups: int, blocks_per_table: int) -> None:
        self._rng = np.random.default_rng(0)
        self._text = text
        self._num_groups = num_groups
        self._blocks_per_table = blocks_per_table
        self._num_tables = max(1, *plan.decode)
        self._prompts = [self._token_ids(plan.context) for _ in range(_NUM_CONTEXTS)]

    def contexts(self) -> Iterator[ScheduledBatch]:
        """What lies before the tokens that are decoded, in every table."""
        step = 0
        for index, prompt in enumerate(self._prompts[: self._num_tables]):
            context = RequestContext(prompt, (), 0)
            for first in range(0, len(prompt), _CHUNK_TOKENS):
                token_ids = prompt[first : first + _CHUNK_TOKENS]
                request = ScheduledRequest(
                    f"decode-{index}", token_ids, first, self._tables(index), _GREEDY, False, context=context
                )
                yield ScheduledBatch(step, (request,))
                step += 1
        copies = [
            KVOp(KVOpKind.COPY, source, destination)
            for index in range(_NUM_CONTEXTS, self._num_tables)
            for tables in zip(self._tables(index % _NUM_CONTEXTS), self._tables(index), strict=True)
            for source, destination in zip(*tables, strict=True)
        ]
        yield ScheduledBatch(step, (), tuple(copies))

    def decode(self, num_requests: int) -> Iterator[ScheduledBatch]:
        """Step after step of the same requests."""
        prompts = [self._prompts[index % _NUM_CONTEXTS] for index in range(num_requests)]
        for step in range(_MAX_STEPS):
            requests = tuple(
                ScheduledRequest(
                    f"decode-{index}",
                    (PENDING_TOKEN_ID,) if step else prompt[-1:],
                    len(prompt) - 1 + step,
                    self._tables(index),
                    _GREEDY,
                    True,
                    context=None if step else RequestContext(prompt, (), 0),
                )
                for index, prompt in enumerate(prompts)
            )
            yield ScheduledBatch(step, requests)

    def prefill(self, num_tokens: int) -> Iterator[ScheduledBatch]:
        for step in range(_MAX_STEPS):
            prompt = self._token_ids(num_tokens)
            context = RequestContext(prompt, (), 0)
            request = ScheduledRequest("prefill", prompt, 0, self._tables(0), _GREEDY, True, context=context)
            yield ScheduledBatch(step, (request,))

    def _token_ids(self, num_tokens: int) -> tuple[int, ...]:
        """A piece of the text, which begins anew at its end."""
        first = int(self._rng.integers(0, len(self._text)))
        return tuple(self._text[(first + i) % len(self._text)] for i in range(num_tokens))

    def _tables(self, index: int) -> tuple[tuple[int, ...], ...]:
        """A table per KV group. Block 0 belongs to nobody."""
        size = self._blocks_per_table
        firsts = (1 + (index * self._num_groups + group) * size for group in range(self._num_groups))
        return tuple(tuple(range(first, first + size)) for first in firsts)
