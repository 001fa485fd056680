"""Logprobs of tokens that a request names (`SamplingParams.logprob_token_ids`), whatever is likely."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pelton.core.output import TokenLogprobs
from pelton.core.sampling_params import SamplingParams
from pelton.worker.sampling.sampler import Sampler

# By row: (token_id, logprob), the most likely first; equal ones by id.
PickedLogprobs = dict[int, tuple[tuple[int, float], ...]]


def picked_logprobs(sampler: Sampler, logits: Any, samplings: Sequence[SamplingParams]) -> PickedLogprobs:
    """Of the rows of raw `logits` [S, V] that name tokens, to be called before they are edited."""
    picked: PickedLogprobs = {}
    for i, sampling in enumerate(samplings):
        if not sampling.logprob_token_ids:
            continue
        row = logits[i]
        # The one pass over the vocabulary gives the normalizer, that of the greatest logit less its logprob.
        greatest = int(row.argmax())
        found = sampler.token_logprobs(logits[i : i + 1], [greatest], 0)
        if found is None:
            continue  # the sampler says what is wrong
        log_normalizer = float(row[greatest]) - found[0].logprob
        token_ids = sampling.logprob_token_ids
        named = row[list(token_ids)].tolist()
        picked[i] = _ordered([(each, value - log_normalizer) for each, value in zip(token_ids, named, strict=True)])
    return picked


def with_picked(logprobs: dict[int, TokenLogprobs], picked: PickedLogprobs) -> dict[int, TokenLogprobs]:
    """`logprobs` with the picked ones, and the sampled token's own, in place of the most likely."""
    return logprobs | {
        i: replace(logprobs[i], top=_ordered([*top, (logprobs[i].token_id, logprobs[i].logprob)]))
        for i, top in picked.items()
        if i in logprobs
    }


def _ordered(values: Sequence[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """Without what is impossible, and each token once: as the later of two says."""
    known = {token_id: logprob for token_id, logprob in values if logprob > -math.inf}
    return tuple(sorted(known.items(), key=lambda item: (-item[1], item[0])))
