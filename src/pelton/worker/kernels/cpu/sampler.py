"""`NativeSampler`: all rows of a step in one call, spread over threads. Legend as in `sampling/sampler.py`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from pelton.core.output import TokenLogprobs
from pelton.core.sampling_params import SamplingParams
from pelton.worker.kernels.cpu import pelton_cpu
from pelton.worker.sampling.sampler import ALL_BANNED, OVERFLOW, Logits, Samples, TokenMask, not_finite

_NOT_FINITE = -1
_PROBLEMS = {-2: ALL_BANNED, -3: OVERFLOW}
_MAX_SEED = 2**64 - 1


class NativeSampler:
    """Implements `sampling.Sampler`. One operation of its runtime at a time."""

    def __init__(self, runtime: pelton_cpu.Runtime, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        self._sampler = pelton_cpu.Sampler(runtime, vocab_size)
        self._vocab_size = vocab_size
        self._eos_token_ids = frozenset(eos_token_ids)

    def make_row(self, sampling: SamplingParams, seed: int) -> pelton_cpu.SamplingRow:
        stop_ids = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else self._eos_token_ids)}
        return pelton_cpu.SamplingRow(
            self._vocab_size,
            temperature=sampling.temperature,
            filters=(sampling.top_k, sampling.top_p, sampling.min_p),
            seed=seed & _MAX_SEED,
            penalties=(sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty),
            bias=list(sampling.logit_bias.items()),
            allowed=None if sampling.allowed_token_ids is None else list(sampling.allowed_token_ids),
            banned=list(sampling.banned_token_ids),
            stops=(sampling.min_tokens, list(stop_ids)),
            num_logprobs=-1 if sampling.logprobs is None else sampling.logprobs,
        )

    def sample(
        self,
        logits: Logits,
        rows: Sequence[pelton_cpu.SamplingRow],
        positions: Sequence[int],
        masks: Sequence[TokenMask | None] | None = None,
    ) -> Samples:
        logits = self._checked(logits, len(rows))
        addresses = [] if masks is None else [self._mask_address(mask) for mask in masks]
        token_ids, logprobs = self._sampler.sample(logits.ctypes.data, rows, positions, addresses)
        problems: dict[int, str] = {}
        if min(token_ids, default=0) < 0:
            for i, token_id in enumerate(token_ids):
                if token_id < 0:
                    problems[i] = _PROBLEMS.get(token_id) or not_finite(float(logits[i].max()))
                    token_ids[i] = -1
        return Samples(token_ids, problems, {i: _logprobs(found) for i, found in logprobs})

    def try_sample_late(self, logits: Logits, rows: Sequence[pelton_cpu.SamplingRow], positions: Sequence[int]) -> None:
        """Nothing is late on the host."""

    def token_logprobs(self, logits: Logits, token_ids: Sequence[int], num_top: int) -> list[TokenLogprobs] | None:
        logits = self._checked(logits, len(token_ids))
        found = self._sampler.token_logprobs(logits.ctypes.data, token_ids, num_top)
        return None if found is None else [_logprobs(row) for row in found]

    def _checked(self, logits: Logits, num_rows: int) -> Logits:
        """`logits` in the layout that native code reads. Raises ValueError for another shape."""
        if logits.shape != (num_rows, self._vocab_size):
            raise ValueError(f"logits are {logits.shape}, but {num_rows} rows of {self._vocab_size} are wanted")
        return np.ascontiguousarray(logits, dtype=np.float32)

    def _mask_address(self, mask: TokenMask | None) -> int:
        if mask is None:
            return 0
        num_words = -(-self._vocab_size // 32)
        if mask.dtype.itemsize != 4 or mask.shape != (num_words,) or not mask.flags.c_contiguous:
            raise ValueError(f"a mask must be {num_words} words of 32 bits, but is {mask.dtype} {mask.shape}")
        return mask.ctypes.data


def _logprobs(found: tuple[int, float, int, list[tuple[int, float]]]) -> TokenLogprobs:
    token_id, logprob, rank, top = found
    return TokenLogprobs(token_id, logprob, rank, tuple(top))
