"""`DeviceSampler`: all rows of a step on the device. Legend as in `sampling/sampler.py`.

What a request's settings fix is laid out there once, when its row is made: biases and bans as one vector, the tokens
that would stop it, and where it has penalties how often it has written each token.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton

from pelton.core.output import TokenLogprobs
from pelton.core.sampling_params import SamplingParams
from pelton.worker.kernels.triton.device import memory_errors, send
from pelton.worker.kernels.triton.sampling_kernels import (
    choose_kernel,
    edit_kernel,
    logprobs_kernel,
)
from pelton.worker.sampling.sampler import ALL_BANNED, OVERFLOW, Samples, TokenMask, not_finite
from pelton.worker.sampling.uniform import uniform_at
from pelton.worker.sampling.weights import MIN_TEMPERATURE, ONE, least_weight

# Of a block of logits; a row of 152k is 19 of these, of 16 values for each of 512 threads.
_BLOCK = 8192
_LOGPROBS_BLOCK = 2048  # its cumulative sums would spill with more
_PROBLEMS = {-2: ALL_BANNED, -3: OVERFLOW}


class DeviceRow:
    """Implements `SamplingRow`."""

    def __init__(
        self, sampling: SamplingParams, seed: int, eos_token_ids: Iterable[int], vocab_size: int, device: torch.device
    ) -> None:
        self.sampling = sampling
        self.seed = seed
        self._device = device
        self.bias = self._make_bias(vocab_size)
        stops = (
            {*sampling.stop_token_ids, *(() if sampling.ignore_eos else eos_token_ids)} if sampling.min_tokens else ()
        )
        self.stops = self._make_words(stops, vocab_size)
        has_penalty = sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0
        self._is_repetitive = sampling.repetition_penalty != 1.0
        self.counts: torch.Tensor | None = None  # in the output; -1: not in the prompt either
        if has_penalty or self._is_repetitive:
            self.counts = torch.full((vocab_size,), -1, dtype=torch.int32, device=device)
        self._unseen: dict[int, int] = {}  # since `counts` was last brought up to date

    def add_prompt(self, token_ids: Sequence[int]) -> None:
        if self._is_repetitive:
            self._unseen |= {token_id: self._unseen.get(token_id, 0) for token_id in token_ids}

    def add_output(self, token_ids: Sequence[int]) -> None:
        if self.counts is not None:
            for token_id in token_ids:
                self._unseen[token_id] = self._unseen.get(token_id, 0) + 1

    def is_edited(self, position: int) -> bool:
        return self.bias is not None or self.counts is not None or self.is_held(position)

    def is_held(self, position: int) -> bool:
        """Whether the tokens that would stop it are banned."""
        return self.stops is not None and position < self.sampling.min_tokens

    def flush(self) -> None:
        """Bring `counts` up to date."""
        if self.counts is None or not self._unseen:
            return
        pairs = np.array(list(self._unseen.items()), dtype=np.int64)
        ids, added = send(pairs, self._device).unbind(1)
        self.counts[ids] = self.counts[ids].clamp_min(0) + added.to(torch.int32)
        self._unseen.clear()

    def _make_bias(self, vocab_size: int) -> torch.Tensor | None:
        sampling = self.sampling
        if not (sampling.logit_bias or sampling.banned_token_ids or sampling.allowed_token_ids is not None):
            return None
        bias = np.zeros(vocab_size, np.float32)
        for token_id, value in sampling.logit_bias.items():
            if 0 <= token_id < vocab_size:
                bias[token_id] = value
        if sampling.allowed_token_ids is not None:
            is_banned = np.ones(vocab_size, bool)
            is_banned[_known(sampling.allowed_token_ids, vocab_size)] = False
            bias[is_banned] = -np.inf
        bias[_known(sampling.banned_token_ids, vocab_size)] = -np.inf
        return send(bias, self._device)

    def _make_words(self, token_ids: Iterable[int], vocab_size: int) -> torch.Tensor | None:
        known = _known(token_ids, vocab_size)
        if not known:
            return None
        words = np.zeros(-(-vocab_size // 32), np.uint32)
        np.bitwise_or.at(words, np.array(known) // 32, np.uint32(1) << (np.array(known) % 32).astype(np.uint32))
        return send(words.view(np.int32), self._device)


class LateTokens:
    """Implements `LateSamples`."""

    def __init__(self, tokens: torch.Tensor, logits: torch.Tensor) -> None:
        """`tokens` as `DeviceSampler.choose` gives them; begins to bring them to the host."""
        self.tokens = tokens
        self._logits = logits
        self._on_host = tokens
        self._done: torch.cuda.Event | None = None
        if tokens.device.type == "cuda":
            self._on_host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self._on_host.copy_(tokens, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()

    def wait(self) -> None:
        if self._done is not None:
            self._done.synchronize()

    def result(self) -> Samples:
        self.wait()
        return _as_samples(self._on_host.tolist(), self._logits)


class DeviceSampler:
    """Implements `Sampler` for logits that are tensors; arrays are brought to the device."""

    def __init__(self, vocab_size: int, eos_token_ids: Iterable[int], device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = frozenset(eos_token_ids)
        self._device = device
        self._block = min(triton.next_power_of_2(vocab_size), _BLOCK)

    def make_row(self, sampling: SamplingParams, seed: int) -> DeviceRow:
        return DeviceRow(sampling, seed, self._eos_token_ids, self._vocab_size, self._device)

    @memory_errors()
    def sample(
        self,
        logits: torch.Tensor | npt.NDArray[np.float32],
        rows: Sequence[DeviceRow],
        positions: Sequence[int],
        masks: Sequence[TokenMask | None] | None = None,
    ) -> Samples:
        """As `choose`, with the answer brought to the host, and logprobs."""
        x = self._as_tensor(logits)
        samples = _as_samples(self.choose(x, rows, positions, masks).tolist(), x)
        wanted = [i for i, row in enumerate(rows) if row.sampling.logprobs is not None and i not in samples.problems]
        if wanted:
            counts = [rows[i].sampling.logprobs or 0 for i in wanted]
            found = self._logprobs(x, wanted, [samples.token_ids[i] for i in wanted], counts)
            samples.logprobs.update((i, each) for i, each in zip(wanted, found, strict=True) if each is not None)
        return samples

    @memory_errors()
    def try_sample_late(
        self, logits: torch.Tensor, rows: Sequence[DeviceRow], positions: Sequence[int]
    ) -> LateTokens | None:
        if any(row.counts is not None or row.sampling.logprobs is not None for row in rows):
            return None
        return LateTokens(self.choose(logits, rows, positions), logits)

    def choose(
        self,
        logits: torch.Tensor,
        rows: Sequence[DeviceRow],
        positions: Sequence[int],
        masks: Sequence[TokenMask | None] | None = None,
    ) -> torch.Tensor:
        """Token ids int64 [S] on the device, negative where a row has none; `logits` stay as they are."""
        tokens = torch.empty(len(rows), dtype=torch.int64, device=self._device)
        if not rows:
            return tokens
        edited = self._edit(logits, rows, positions, masks)
        settings = np.stack([_settings(row, position) for row, position in zip(rows, positions, strict=True)])
        choose_kernel[(len(rows),)](
            logits,
            logits if edited is None else edited,
            self._send(settings),
            tokens,
            self._vocab_size,
            logits.stride(0),
            edited is not None,
            self._block,
            num_warps=16,
            enable_fp_fusion=False,
        )
        return tokens

    @memory_errors()
    def token_logprobs(
        self, logits: torch.Tensor | npt.NDArray[np.float32], token_ids: Sequence[int], num_top: int
    ) -> list[TokenLogprobs] | None:
        x = self._as_tensor(logits)
        found = self._logprobs(x, range(len(x)), token_ids, [num_top] * len(token_ids))
        known = [each for each in found if each is not None]
        return known if len(known) == len(found) else None

    def _as_tensor(self, logits: torch.Tensor | npt.NDArray[np.float32]) -> torch.Tensor:
        tensor = logits if isinstance(logits, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(logits))
        return tensor.to(self._device, torch.float32).contiguous()

    def _edit(
        self,
        logits: torch.Tensor,
        rows: Sequence[DeviceRow],
        positions: Sequence[int],
        masks: Sequence[TokenMask | None] | None,
    ) -> torch.Tensor | None:
        """A copy in which rows are as their settings and masks want them; None where none want anything."""
        known = masks or [None] * len(rows)
        chosen = [i for i, row in enumerate(rows) if known[i] is not None or row.is_edited(positions[i])]
        if not chosen:
            return None
        words: list[TokenMask] = []
        addresses = np.zeros((len(chosen), 4), np.int64)
        penalties = np.zeros((len(chosen), 3), np.float32)
        for index, i in enumerate(chosen):
            row, mask, sampling = rows[i], known[i], rows[i].sampling
            row.flush()
            held = row.stops if row.is_held(positions[i]) else None
            addresses[index, :3] = [0 if each is None else each.data_ptr() for each in (row.bias, held, row.counts)]
            addresses[index, 3] = -1 if mask is None else len(words)
            if mask is not None:
                words.append(mask)
            penalties[index] = sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty
        num_words = -(-self._vocab_size // 32)
        stacked = np.stack(words).view(np.int32) if words else np.zeros((1, num_words), np.int32)
        edited = logits.clone()
        edit_kernel[(len(chosen), -(-self._vocab_size // self._block))](
            edited,
            self._send(np.array(chosen, np.int64)),
            self._send(stacked),
            self._send(addresses),
            self._send(penalties),
            self._vocab_size,
            edited.stride(0),
            num_words,
            self._block,
            num_warps=8,
            enable_fp_fusion=False,
        )
        return edited

    def _send(self, values: npt.NDArray[Any]) -> torch.Tensor:
        return send(values, self._device)

    def _logprobs(
        self, x: torch.Tensor, rows: Sequence[int], token_ids: Sequence[int], counts: Sequence[int]
    ) -> list[TokenLogprobs | None]:
        """Of raw logits `x`, with the `counts[i]` likeliest; None where a row is not finite."""
        if not len(rows):
            return []
        most = triton.next_power_of_2(max(*counts, 1))
        facts = torch.empty((len(rows), 4), dtype=torch.int64, device=self._device)
        ids = torch.full((len(rows), most), -1, dtype=torch.int32, device=self._device)
        values = torch.empty((len(rows), most), dtype=torch.float32, device=self._device)
        logprobs_kernel[(len(rows),)](
            x,
            torch.tensor(list(rows), dtype=torch.int64, device=self._device),
            torch.tensor(list(token_ids), dtype=torch.int64, device=self._device),
            torch.tensor(list(counts), dtype=torch.int64, device=self._device),
            facts,
            ids,
            values,
            self._vocab_size,
            x.stride(0),
            most,
            min(self._block, _LOGPROBS_BLOCK),
            num_warps=16,
            enable_fp_fusion=False,
        )
        arrays = zip(token_ids, facts.tolist(), ids.tolist(), values.tolist(), strict=True)
        return [_logprobs_of(*each) for each in arrays]


def _as_samples(token_ids: list[int], logits: torch.Tensor) -> Samples:
    problems = {
        i: _PROBLEMS.get(token_id) or not_finite(float(logits[i].max()))
        for i, token_id in enumerate(token_ids)
        if token_id < 0
    }
    return Samples([max(token_id, -1) for token_id in token_ids], problems, {})


def _settings(row: DeviceRow, position: int) -> npt.NDArray[np.int64]:
    sampling = row.sampling
    temperature = max(sampling.temperature, MIN_TEMPERATURE)
    random = -1 if sampling.is_greedy else int(uniform_at(row.seed, position) * 2**53)
    floats = (_bits(temperature), _bits(1.0 / temperature), sampling.top_k, _bits(sampling.top_p))
    return np.array([*floats, least_weight(sampling.min_p), random], np.int64)


def _bits(value: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def _logprobs_of(
    token_id: int, facts: Sequence[int], ids: Sequence[int], values: Sequence[float]
) -> TokenLogprobs | None:
    top_key, total, own_key, rank = facts
    if rank < 0:
        return None
    normalizer = _value_of(top_key) + math.log(total / ONE)
    top = sorted((-value, i) for i, value in zip(ids, values, strict=True) if i >= 0)
    return TokenLogprobs(
        token_id, _value_of(own_key) - normalizer, rank, tuple((i, -value - normalizer) for value, i in top)
    )


def _value_of(key: int) -> float:
    """The float32 whose bits, ordered as integers, are `key`."""
    bits = key if key >= 0 else key ^ 0x7FFFFFFF
    return float(struct.unpack("<f", struct.pack("<i", bits))[0])


def _known(token_ids: Iterable[int], vocab_size: int) -> list[int]:
    return [token_id for token_id in token_ids if 0 <= token_id < vocab_size]
