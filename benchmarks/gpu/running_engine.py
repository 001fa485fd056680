"""The production engine on a thread, without HTTP: scheduler, KV manager, executor, over dummy weights."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pelton.build import connect_peers, join_engine
from pelton.cluster.config import TransferConfig
from pelton.core.model_spec import ModelSpec
from pelton.core.protocols import MonotonicClock
from pelton.core.request import Submission
from pelton.core.sampling_params import SamplingParams
from pelton.engine.config import EngineConfig
from pelton.engine.loop import EngineLoop
from pelton.engine.wire import EngineUpdate, Shutdown, Submit
from pelton.weights.architectures import expected_tensors
from pelton.weights.config import ModelConfig
from pelton.weights.random_tensor import RandomTensor
from pelton.weights.tensors import GenerationDefaults, WeightTensor
from pelton.worker.config import WorkerConfig
from pelton.worker.executors.build_worker import build_executor


class Letters:
    """A tokenizer that costs nothing: every token is a letter."""

    eos_token_ids: frozenset[int] = frozenset()

    def token_bytes(self, token_id: int) -> bytes:
        del token_id
        return b"a"

    def is_special(self, token_id: int) -> bool:
        del token_id
        return False


class MadeUpFiles:
    """A model whose tensors are random, the same ones on every device; large enough that its text varies."""

    path = Path(__file__)
    generation_defaults = GenerationDefaults()
    chat_template = tokenizer_metadata = None

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self._shapes = expected_tensors(spec)

    def tensor_names(self) -> list[str]:
        return list(self._shapes)

    def tensor(self, name: str) -> WeightTensor:
        shape = self._shapes[name]
        made = RandomTensor(name, shape, 1.0 if "norm" in name else 0.0, 1.2 * shape[-1] ** -0.5)
        return WeightTensor(name, shape, "F32", made.data)

    def drop_pages(self) -> None:
        pass


@dataclass
class Answer:
    """Of one request; times are seconds on the clock of `time.perf_counter`."""

    token_ids: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    error: str | None = None
    is_done: bool = False


class RunningEngine:
    def __init__(
        self,
        spec: ModelSpec,
        worker: dict[str, Any],
        engine: dict[str, Any],
        *,
        quantization: str | None = None,
        same_weights: bool = False,
        transfer: TransferConfig | None = None,
    ) -> None:
        """`same_weights`: those of `MadeUpFiles`, else what a device draws by itself, which takes no time. `transfer`:
        other engines to take blocks from, or to give them to."""
        start_s = time.perf_counter()
        config = EngineConfig(**{"enable_prefix_caching": False, "host_kv_cache_gb": 0.0, **engine})
        model = ModelConfig(load_format="auto" if same_weights else "dummy", quantization=quantization)
        worker_config = WorkerConfig(**{"enable_weight_cache": False, **worker})
        connect = partial(connect_peers, transfer) if transfer is not None else None
        files = MadeUpFiles(spec)
        executor, info = build_executor(files, model, worker_config, config, eos_token_ids=(), connect=connect)
        joined = join_engine(config, executor, info, Letters(), MonotonicClock(), spec.kv_groups, executor)
        self.engine = joined  # its thread's
        self.info = info
        self.spec = spec
        self.load_s = time.perf_counter() - start_s
        self._changed = threading.Condition()
        self._answers: dict[str, Answer] = {}
        self._count = 0
        self._loop = EngineLoop(joined, self._take)
        self._thread = threading.Thread(target=self._loop.run, name="engine-loop", daemon=True)
        self._thread.start()

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int, **sampling: Any) -> list[Answer]:
        """All at once, greedy unless told otherwise; exactly `num_tokens` each. Raises RuntimeError where one fails."""
        answers = []
        settings = {"temperature": 0.0, "max_tokens": num_tokens, "ignore_eos": True, **sampling}
        for prompt in prompts:
            self._count += 1
            answers.append(Answer())
            self._answers[str(self._count)] = answers[-1]
            self._loop.put(
                Submit(
                    Submission(
                        request_id=str(self._count), prompt_token_ids=list(prompt), sampling=SamplingParams(**settings)
                    )
                )
            )
        with self._changed:
            while not all(answer.is_done for answer in answers):
                if not self._changed.wait(timeout=60.0) and not self._thread.is_alive():
                    raise RuntimeError("the engine's thread has ended")
        problems = {answer.error for answer in answers if answer.error is not None}
        if problems:
            raise RuntimeError("; ".join(sorted(problems)))
        return answers

    def _take(self, update: EngineUpdate) -> None:
        now_s = time.perf_counter()
        with self._changed:
            for output in update.outputs:
                answer = self._answers[output.request_id]
                answer.token_ids += output.token_ids
                answer.times_s += [now_s] * len(output.token_ids)
                answer.logprobs += [each.logprob for each in output.logprobs or ()]
                if output.error is not None:
                    answer.error = output.error.message
                answer.is_done = output.finish_reason is not None
            self._changed.notify_all()

    def close(self) -> None:
        self._loop.put(Shutdown())
        self._thread.join()

    def __enter__(self) -> RunningEngine:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()


def make_prompts(spec: ModelSpec, num_prompts: int, length: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, spec.vocab_size, length).tolist() for _ in range(num_prompts)]


def num_product_weights(spec: ModelSpec) -> int:
    """Numbers that a step multiplies with: all matrices but the embedding's, which is looked up (unless it is the
    head's, too). Of experts all."""
    shapes = expected_tensors(spec)
    names = [name for name in shapes if len(shapes[name]) == 2]
    kept = [name for name in names if "embed_tokens" not in name or spec.tie_word_embeddings]
    return sum(math.prod(shapes[name]) for name in kept)
