"""`TritonSampler`: the likeliest tokens are found on the device; what else a row may ask for, on the host.

Legend as in `sampling/sampler.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from pelton.core.output import TokenLogprobs
from pelton.core.sampling_params import SamplingParams
from pelton.worker.sampling.reference import ReferenceRow, ReferenceSampler
from pelton.worker.sampling.sampler import Samples, TokenMask, not_finite

_BLOCK = 4096


class TritonRow(ReferenceRow):
    """Implements `SamplingRow`."""

    @property
    def is_plain(self) -> bool:
        """Whether its token is that of the greatest logit, and nothing else is wanted."""
        return self._editor is None and self.sampling.is_greedy and self.sampling.logprobs is None


class TritonSampler:
    """Implements `Sampler` for logits on the device."""

    def __init__(self, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = frozenset(eos_token_ids)
        self._on_host = ReferenceSampler(vocab_size, self._eos_token_ids)

    def make_row(self, sampling: SamplingParams, seed: int) -> TritonRow:
        return TritonRow(sampling, seed, self._eos_token_ids, self._vocab_size)

    def sample(
        self,
        logits: torch.Tensor,
        rows: Sequence[TritonRow],
        positions: Sequence[int],
        masks: Sequence[TokenMask | None] | None = None,
    ) -> Samples:
        masks = masks or [None] * len(rows)
        others = [i for i, row in enumerate(rows) if not row.is_plain or masks[i] is not None]
        samples = Samples([-1] * len(rows), {}, {})
        if len(others) < len(rows):
            samples = LikeliestTokens(logits).result()
        if others:
            chosen = logits if len(others) == len(rows) else logits[torch.tensor(others, device=logits.device)]
            found = self._on_host.sample(
                chosen.cpu().numpy(), *([values[i] for i in others] for values in (rows, positions, masks))
            )
            for place, i in enumerate(others):
                samples.token_ids[i] = found.token_ids[place]
                samples.problems.pop(i, None)
            samples.problems.update({others[place]: problem for place, problem in found.problems.items()})
            samples.logprobs.update({others[place]: logprobs for place, logprobs in found.logprobs.items()})
        return samples

    def try_sample_late(
        self, logits: torch.Tensor, rows: Sequence[TritonRow], positions: Sequence[int]
    ) -> LikeliestTokens | None:
        del positions  # nothing is drawn
        return LikeliestTokens(logits) if all(row.is_plain for row in rows) else None

    def token_logprobs(
        self, logits: torch.Tensor, token_ids: Sequence[int], num_top: int
    ) -> list[TokenLogprobs] | None:
        return self._on_host.token_logprobs(logits.cpu().numpy(), token_ids, num_top)


class LikeliestTokens:
    """Implements `LateSamples`."""

    def __init__(self, logits: torch.Tensor) -> None:
        """Begins to look for the greatest of each row of float32 `logits` [S, V]; the lowest id of equals."""
        num_rows, width = logits.shape
        found = torch.empty((2, num_rows), dtype=torch.int32, device=logits.device)  # ids, bits of the logits
        _likeliest_kernel[(num_rows,)](
            logits,
            found,
            found.view(torch.float32),
            num_rows,
            logits.stride(0),
            WIDTH=width,
            BLOCK=_BLOCK,
            num_warps=8,
        )
        self.tokens = found[0]  # -1: the row is not finite
        self._done: torch.cuda.Event | None = None
        if logits.device.type == "cuda":
            self._found = torch.empty(found.shape, dtype=torch.int32, pin_memory=True)
            self._found.copy_(found, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()
        else:
            self._found = found

    def wait(self) -> None:
        if self._done is not None:
            self._done.synchronize()

    def result(self) -> Samples:
        self.wait()
        found: npt.NDArray[np.int32] = self._found.numpy()
        token_ids: list[int] = found[0].tolist()
        greatest: list[float] = found[1].view(np.float32).tolist()
        problems = {i: not_finite(greatest[i]) for i, token_id in enumerate(token_ids) if token_id < 0}
        return Samples(token_ids, problems, {})


@triton.jit
def _likeliest_kernel(logits, tokens, greatest, num_rows, row_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    where = tl.zeros((BLOCK,), tl.int32)
    nan = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, WIDTH, BLOCK):
        values = tl.load(logits + row * row_stride + first + columns, mask=first + columns < WIDTH, other=float("-inf"))
        nan |= (values != values).to(tl.int32)
        is_better = values > best
        best = tl.where(is_better, values, best)
        where = tl.where(is_better, first + columns, where)
    top = tl.max(best, axis=0)
    token = tl.min(tl.where(best == top, where, WIDTH), axis=0)
    is_finite = (tl.max(nan, axis=0) == 0) & (top > float("-inf")) & (top < float("inf"))
    tl.store(tokens + row, tl.where(is_finite, token, -1))
    tl.store(greatest + num_rows + row, tl.where(tl.max(nan, axis=0) == 0, top, float("nan")))
