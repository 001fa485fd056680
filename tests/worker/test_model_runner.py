"""The runner on tiny random models: any split of the work gives the tokens of one whole prefill.

The tests play the scheduler by hand, so that chunks, overlap, copies and lost blocks are exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch

from pelton.core.batch import (
    NULL_BLOCK_ID,
    PENDING_TOKEN_ID,
    KVOp,
    KVOpKind,
    RequestContext,
    ScheduledBatch,
    ScheduledRequest,
    StepResult,
)
from pelton.core.errors import EngineStepError
from pelton.core.model_spec import ModelSpec, RopeSpec, make_kv_groups
from pelton.core.output import TokenLogprobs
from pelton.core.sampling_params import SamplingParams
from pelton.worker.kernels.cpu.program import NativeProgram
from pelton.worker.kernels.ops import make_kernels
from pelton.worker.kv_storage import KVStorage
from pelton.worker.model_runner import ModelRunner
from pelton.worker.models.registry import Model, make_dummy_model
from pelton.worker.sampling.reference import ReferenceSampler
from tests.worker.native import CPU_BACKENDS

pytestmark = pytest.mark.torch

BLOCK_SIZE = 4
WINDOW = 6
VOCAB_SIZE = 97
GREEDY = SamplingParams(temperature=0.0, logprobs=2)


def make_spec(windows: list[int | None], architecture: str) -> ModelSpec:
    return ModelSpec(
        architecture=architecture,
        num_layers=len(windows),
        hidden_size=32,
        intermediate_size=48,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        vocab_size=VOCAB_SIZE,
        max_model_len=256,
        rms_norm_eps=1e-6,
        rope=RopeSpec(theta=10_000.0, rotary_dim=8),
        rope_local=RopeSpec(theta=1_000.0, rotary_dim=8) if architecture == "gemma3" else None,
        kv_groups=make_kv_groups(windows),
        hidden_act="gelu_tanh" if architecture == "gemma3" else "silu",
        tie_word_embeddings=architecture == "gemma3",
    )


SPECS = {
    "full": make_spec([None, None], "llama"),
    "sliding": make_spec([WINDOW, WINDOW, None, WINDOW, WINDOW, None], "gemma3"),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only lose by waiting for a second one."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(params=[(spec, backend) for spec in SPECS for backend in CPU_BACKENDS], ids="-".join)
def model(request: pytest.FixtureRequest) -> Model:
    spec, backend = request.param
    return make_dummy_model(SPECS[spec], make_kernels(backend))


@dataclass
class Tracked:
    """A request as the engine sees it: it learns of a token only when a result is taken."""

    prompt: tuple[int, ...]
    sampling: SamplingParams
    seed: int
    outputs: list[int] = field(default_factory=list)
    num_pending: int = 0
    num_computed: int = 0
    tables: list[list[int]] = field(default_factory=list)
    is_known_to_worker: bool = False
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    @property
    def num_wanted(self) -> int:
        return len(self.prompt) + len(self.outputs) + self.num_pending - self.num_computed


class Driver:
    """Builds batches for a runner, as wide and as ragged as a test wants them."""

    def __init__(self, model: Model, num_blocks: int = 200) -> None:
        self.groups = model.spec.kv_groups
        self.kv = KVStorage(model.spec, num_blocks, BLOCK_SIZE, "float32", model.kernels)
        # Slots that nobody wrote hold anything at all; NaN shows whoever reads them.
        for layer_id in range(model.spec.num_layers):
            cache = self.kv.layer_cache(layer_id)
            cache.keys[...] = cache.values[...] = math.nan
        self.runner = ModelRunner(model, self.kv, ReferenceSampler(model.spec.vocab_size, {0}), block_size=BLOCK_SIZE)
        self.requests: dict[str, Tracked] = {}
        self.free_blocks = list(range(num_blocks - 1, 0, -1))
        self.kv_ops: list[KVOp] = []
        self.preempted_ids: list[str] = []
        self.finished_ids: list[str] = []
        self.step_id = 0

    def add(self, request_id: str, prompt: Sequence[int], sampling: SamplingParams = GREEDY, seed: int = 0) -> Tracked:
        request = self.requests[request_id] = Tracked(tuple(prompt), sampling, seed)
        request.tables = [[] for _ in self.groups]
        return request

    def schedule(self, shares: dict[str, int]) -> ScheduledBatch:
        """A batch with `shares[id]` tokens of each request, or all it wants where that is fewer."""
        self.step_id += 1
        scheduled = tuple(self._share(request_id, count) for request_id, count in shares.items())
        batch = ScheduledBatch(
            self.step_id, scheduled, tuple(self.kv_ops), tuple(self.preempted_ids), tuple(self.finished_ids)
        )
        self.kv_ops, self.preempted_ids, self.finished_ids = [], [], []
        return batch

    def _share(self, request_id: str, num_tokens: int) -> ScheduledRequest:
        request = self.requests[request_id]
        num_tokens = min(num_tokens, request.num_wanted)
        start, end = request.num_computed, request.num_computed + num_tokens
        samples = num_tokens == request.num_wanted
        known = (*request.prompt, *request.outputs)
        token_ids = (*known[start:end], *[PENDING_TOKEN_ID] * (end - max(start, len(known))))
        for group, table in zip(self.groups, request.tables, strict=True):
            if group.sliding_window is not None:
                for index in range(min(max(0, start - group.sliding_window + 1) // BLOCK_SIZE, len(table))):
                    table[index] = NULL_BLOCK_ID
            while len(table) * BLOCK_SIZE < end:
                table.append(self.free_blocks.pop())
        context = None
        if not request.is_known_to_worker:
            context = RequestContext(request.prompt, tuple(request.outputs), request.seed)
            request.is_known_to_worker = True
        request.num_computed = end
        request.num_pending += samples
        tables = tuple(map(tuple, request.tables))
        return ScheduledRequest(request_id, token_ids, start, tables, request.sampling, samples, context=context)

    def preempt(self, request_id: str) -> None:
        request = self.requests[request_id]
        request.tables = [[] for _ in self.groups]
        request.num_computed = 0
        request.is_known_to_worker = False
        self.preempted_ids.append(request_id)

    def take(self, batch: ScheduledBatch, result: StepResult) -> None:
        assert result.step_id == batch.step_id
        for answers in (result.sampled_token_ids, result.logprobs, result.prompt_logprobs):
            assert len(answers) == len(batch.requests)
        assert result.elapsed_s > 0
        for i, scheduled in enumerate(batch.requests):
            request = self.requests[scheduled.request_id]
            request.num_pending -= scheduled.samples
            request.outputs += result.sampled_token_ids[i]
            request.logprobs += result.logprobs[i] or ()
            request.prompt_logprobs += result.prompt_logprobs[i] or ()
            has_failed = scheduled.request_id in (result.failed or {})
            assert len(result.sampled_token_ids[i]) == (scheduled.samples and not has_failed)

    def step(self, shares: dict[str, int]) -> StepResult:
        batch = self.schedule(shares)
        result = self.runner.run_step(batch)
        self.take(batch, result)
        return result

    def run(self, num_outputs: int, chunk: int = 1000) -> None:
        """Every request to `num_outputs` tokens, `chunk` tokens of each in a step."""
        while shares := {i: chunk for i, r in self.requests.items() if len(r.outputs) < num_outputs}:
            assert self.step(shares).failed is None


def make_prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(1000 + seed)
    return tuple(torch.randint(1, VOCAB_SIZE, (length,), generator=generator).tolist())


def alone(
    model: Model, prompt: Sequence[int], num_outputs: int, sampling: SamplingParams = GREEDY, seed: int = 0
) -> Tracked:
    """The request by itself, prompt in one step, one token a step."""
    driver = Driver(model)
    request = driver.add("alone", prompt, sampling, seed)
    driver.run(num_outputs)
    return request


def assert_as_alone(model: Model, request: Tracked, num_outputs: int) -> None:
    """Tokens and the bits of their logprobs, over the first `num_outputs` (law 3)."""
    expected = alone(model, request.prompt, num_outputs, request.sampling, request.seed)
    assert request.outputs[:num_outputs] == expected.outputs
    assert request.logprobs[:num_outputs] == expected.logprobs


def recomputed(model: Model, prompt: Sequence[int], num_outputs: int) -> list[int]:
    """Greedy tokens with no cache at all: a whole prefill for each."""
    tokens = list(prompt)
    for _ in range(num_outputs):
        tokens += alone(model, tokens, 1).outputs
    return tokens[len(prompt) :]


def test_decoding_equals_a_fresh_prefill_for_every_token(model: Model) -> None:
    prompt = make_prompt(13)
    outputs = alone(model, prompt, 12).outputs
    assert outputs == recomputed(model, prompt, 12)
    assert len(set(outputs)) > 2, "a model that repeats itself proves nothing"


@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_chunked_prefill_gives_the_same_tokens(model: Model, chunk: int) -> None:
    prompt = make_prompt(37)
    driver = Driver(model)
    driver.add("a", prompt)
    driver.run(8, chunk)
    assert_as_alone(model, driver.requests["a"], 8)


def test_a_mixed_batch_gives_each_request_its_own_tokens(model: Model) -> None:
    """Prompts of many lengths start at different steps, some chunked, some decoding, one sampled."""
    driver = Driver(model)
    sampled = SamplingParams(temperature=0.9, top_k=20, logprobs=0)
    lengths = {"a": 1, "b": 5, "c": 23, "d": 40, "e": 4}
    for seed, (request_id, length) in enumerate(lengths.items()):
        sampling = sampled if request_id == "e" else GREEDY
        driver.add(request_id, make_prompt(length, seed), sampling, seed)
    driver.step({"a": 9, "d": 11})
    driver.step({"d": 3, "b": 9, "a": 1})
    driver.step({"c": 16, "a": 1, "d": 16, "e": 2, "b": 1})
    driver.run(10, chunk=6)
    for request in driver.requests.values():
        assert_as_alone(model, request, 10)


def test_steps_scheduled_ahead_take_the_token_sampled_here(model: Model) -> None:
    """Three steps are always scheduled before the result of the first is known."""
    prompts = {"a": make_prompt(9, 1), "b": make_prompt(14, 2)}
    driver = Driver(model)
    for request_id, prompt in prompts.items():
        driver.add(request_id, prompt)
    in_flight = [driver.schedule({"a": 100, "b": 10})]
    for _ in range(9):
        in_flight.append(driver.schedule({"b": 100, "a": 100}))
        if len(in_flight) < 3:
            continue
        batch = in_flight.pop(0)
        driver.take(batch, driver.runner.run_step(batch))
    assert any(PENDING_TOKEN_ID in scheduled.token_ids for scheduled in in_flight[-1].requests)
    for batch in in_flight:
        driver.take(batch, driver.runner.run_step(batch))
    for request in driver.requests.values():
        assert_as_alone(model, request, 9)


def test_copy_on_write_leaves_the_first_owner_untouched(model: Model) -> None:
    """Two requests share the blocks of a prompt; the second copies the partial one, then both write."""
    prompt = make_prompt(10)  # blocks of 4: the third is half full
    driver = Driver(model)
    first = driver.add("first", prompt)
    driver.step({"first": 100})
    second = driver.add("second", (*prompt, 5))
    for table, own in zip(first.tables, second.tables, strict=True):
        copy = driver.free_blocks.pop()
        driver.kv_ops.append(KVOp(KVOpKind.COPY, table[2], copy))
        own += [*table[:2], copy]
    second.num_computed = len(prompt)
    driver.run(8, chunk=1)
    assert_as_alone(model, first, 8)
    assert_as_alone(model, second, 8)


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(temperature=1.0, logprobs=0)], ids=["greedy", "sampled"])
def test_preemption_and_resume_change_nothing(model: Model, sampling: SamplingParams) -> None:
    prompt = make_prompt(11)
    driver = Driver(model)
    request = driver.add("a", prompt, sampling, seed=3)
    driver.add("b", make_prompt(6, 4))
    driver.run(4)
    # Scheduled before it is known what "a" sampled, and "a" is preempted: its token still counts.
    in_flight = driver.schedule({"a": 1, "b": 1})
    driver.preempt("a")
    without_it = driver.schedule({"b": 1})
    for batch in (in_flight, without_it):
        driver.take(batch, driver.runner.run_step(batch))
    assert len(request.outputs) == 5
    driver.run(12, chunk=7)
    for request in driver.requests.values():
        assert_as_alone(model, request, 12)


def test_blocks_that_left_the_window_are_not_read() -> None:
    """The freed blocks of sliding-window groups, and the null block, are filled with NaN as we go."""
    model = make_dummy_model(SPECS["sliding"], make_kernels("reference"))
    prompt = make_prompt(30)
    driver = Driver(model)
    request = driver.add("a", prompt)
    held: set[int] = set()
    while len(request.outputs) < 20:
        batch = driver.schedule({"a": 5})
        now = {block_id for table in request.tables for block_id in table}
        for block_id in (held - now) | {NULL_BLOCK_ID}:
            poison(driver, block_id)
        held = now
        result = driver.runner.run_step(batch)
        assert result.failed is None
        driver.take(batch, result)
    assert_as_alone(model, request, 20)
    windowed = [i for i, group in enumerate(driver.groups) if group.sliding_window is not None]
    assert all(request.tables[i].count(NULL_BLOCK_ID) > 5 for i in windowed)


def poison(driver: Driver, block_id: int) -> None:
    for group in driver.groups:
        for layer_id in group.layer_ids:
            cache = driver.kv.layer_cache(layer_id)
            cache.keys[block_id] = cache.values[block_id] = math.nan


@pytest.mark.parametrize("chunk", [1, 3, 16, 1000])
def test_prompt_logprobs_cover_the_prompt_whatever_the_chunks(model: Model, chunk: int) -> None:
    prompt = make_prompt(70)
    sampling = SamplingParams(temperature=0.0, prompt_logprobs=3, logprobs=2)
    driver = Driver(model)
    driver.add("first", make_prompt(8))
    request = driver.add("a", prompt, sampling)
    driver.run(2, chunk)
    assert [entry.token_id for entry in request.prompt_logprobs] == list(prompt[1:])
    # The logprob of prompt token p is that of sampling it after the p tokens before it.
    for p in (1, 31, 32, 33, 34, 65, 69):
        forced = SamplingParams(temperature=0.0, logprobs=3, allowed_token_ids=(prompt[p],))
        expected = alone(model, prompt[:p], 1, forced).logprobs[0]
        assert request.prompt_logprobs[p - 1] == expected
    assert_as_alone(model, request, 2)


def test_requests_that_cannot_run_fail_alone(model: Model) -> None:
    driver = Driver(model)
    driver.add("good", make_prompt(7))
    driver.add("outside", (1, VOCAB_SIZE, 2))
    driver.add("banned", make_prompt(5), SamplingParams(allowed_token_ids=(3,), banned_token_ids=(3,)))
    driver.add("lost", make_prompt(5)).is_known_to_worker = True
    result = driver.step(dict.fromkeys(driver.requests, 100))
    assert result.failed is not None
    assert {request_id: problem.split()[0] for request_id, problem in result.failed.items()} == {
        "outside": "a",
        "banned": "no",
        "lost": "an",
    }
    # The next step was scheduled before the failures were known.
    again = driver.step({"banned": 1, "good": 1})
    assert set(again.failed or {}) == {"banned"}
    driver.requests = {"good": driver.requests["good"]}
    driver.run(6)
    assert_as_alone(model, driver.requests["good"], 6)


def test_nan_in_one_requests_kv_fails_that_request(model: Model) -> None:
    driver = Driver(model)
    driver.add("good", make_prompt(9, 1))
    bad = driver.add("bad", make_prompt(9, 2))
    driver.run(2)
    poison(driver, bad.tables[0][-1])
    result = driver.step({"bad": 1, "good": 1})
    assert set(result.failed or {}) == {"bad"}
    assert "not finite" in (result.failed or {})["bad"]
    del driver.requests["bad"]
    driver.run(6)
    assert_as_alone(model, driver.requests["good"], 6)


def test_nan_in_the_prompts_logits_fails_that_request(model: Model) -> None:
    driver = Driver(model)
    driver.add("good", make_prompt(9, 1))
    bad = driver.add("bad", make_prompt(9, 2), SamplingParams(prompt_logprobs=0))
    driver.step({"bad": 4, "good": 4})
    assert len(bad.prompt_logprobs) == 4
    poison(driver, bad.tables[0][0])
    result = driver.step({"bad": 3, "good": 3})
    assert result.failed == {"bad": "the model's logits for the prompt are not finite"}
    assert result.prompt_logprobs == (None, None)


def test_more_requests_than_logits_are_held_at_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(model)
    monkeypatch.setattr(driver.runner, "_max_logits_rows", 3)
    for seed in range(8):
        driver.add(str(seed), make_prompt(3 + seed, seed))
    driver.run(3)
    for request in driver.requests.values():
        assert_as_alone(model, request, 3)


def test_a_step_that_raises_leaves_nothing_half_done(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(model)
    request = driver.add("a", make_prompt(9))
    driver.run(3)
    batch = driver.schedule({"a": 1})
    ahead = driver.schedule({"a": 1})
    with monkeypatch.context() as patch:
        patch.setattr(driver.runner._program, "logits", raise_an_error)
        with pytest.raises(FloatingPointError):
            driver.runner.run_step(batch)
    # What was in flight behind it cannot know its token, and says so.
    assert set(driver.runner.run_step(ahead).failed or {}) == {"a"}
    request.num_pending = 0
    driver.preempt("a")
    driver.run(8)
    assert_as_alone(model, request, 8)


def raise_an_error(*_: object) -> None:
    raise FloatingPointError("no room for logits")


def test_an_operation_on_a_missing_tier_is_refused(model: Model) -> None:
    driver = Driver(model)
    driver.add("a", make_prompt(3))
    driver.kv_ops.append(KVOp(KVOpKind.LOAD, 1, 2, tier="disk"))
    with pytest.raises(EngineStepError, match="tier 'disk'"):
        driver.step({"a": 3})


def test_a_batch_without_requests_is_bookkeeping_only(model: Model) -> None:
    driver = Driver(model)
    driver.add("a", make_prompt(3))
    driver.run(1)
    driver.finished_ids.append("a")
    result = driver.step({})
    assert result == replace(StepResult(result.step_id, ()), elapsed_s=result.elapsed_s)
    # Forgotten: without a context it cannot go on.
    assert set(driver.step({"a": 1}).failed or {}) == {"a"}


def test_greedy_rows_are_the_same_whatever_others_ask(model: Model) -> None:
    """Alone, where no logits are written out; beside a row that wants them; with logprobs of their own."""
    plain = replace(GREEDY, logprobs=None)
    outputs = []
    for own, others in ((plain, None), (plain, GREEDY), (GREEDY, None)):
        driver = Driver(model)
        request = driver.add("a", make_prompt(9), own)
        if others is not None:
            driver.add("b", make_prompt(6, 4), others)
        driver.run(8)
        outputs.append(request.outputs)
    assert outputs[0] == outputs[1] == outputs[2]


def test_logits_of_greedy_rows_are_not_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_dummy_model(SPECS["full"], make_kernels("native"))
    monkeypatch.delattr(NativeProgram, "logits")
    driver = Driver(model)
    driver.add("a", make_prompt(9), replace(GREEDY, logprobs=None))
    driver.run(4)
