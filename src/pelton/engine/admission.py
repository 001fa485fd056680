"""Checks on a submission, and its expansion into requests. Nothing invalid goes further."""

from __future__ import annotations

import random
from dataclasses import replace
from hashlib import blake2b

from pelton.core.errors import ContextLengthExceededError, InvalidRequestError
from pelton.core.events import EngineInfo
from pelton.core.request import Request, Submission
from pelton.core.sampling_params import SamplingParams


def check_submission(submission: Submission, info: EngineInfo) -> None:
    """Raise what is wrong with a submission for this engine; linear in the prompt, at C speed."""
    num_prompt_tokens = len(submission.prompt_token_ids)
    if num_prompt_tokens == 0:
        raise InvalidRequestError("the prompt is empty; it must hold at least one token", param="prompt")
    pooling = submission.sampling.pooling
    if num_prompt_tokens > info.max_model_len or (num_prompt_tokens == info.max_model_len and pooling is None):
        raise ContextLengthExceededError(
            f"the prompt has {num_prompt_tokens} tokens, but the context holds {info.max_model_len}"
            + (" with at least one output token" if pooling is None else ""),
            param="prompt",
        )
    max_tokens = submission.sampling.max_tokens
    if pooling is None and max_tokens is not None and num_prompt_tokens + max_tokens > info.max_model_len:
        raise ContextLengthExceededError(
            f"the prompt has {num_prompt_tokens} tokens and max_tokens is {max_tokens}, together more than the "
            f"context of {info.max_model_len}; max_tokens may be {info.max_model_len - num_prompt_tokens} at most",
            param="max_tokens",
        )
    if submission.timeout_s is not None and not submission.timeout_s > 0:
        raise InvalidRequestError(f"the timeout is {submission.timeout_s} s; it must be positive", param="timeout_s")
    _check_token_ids("prompt", submission.prompt_token_ids, info.vocab_size)
    _check_sampling(submission.sampling, info.vocab_size)
    if pooling is not None and pooling.dimensions is not None and pooling.dimensions > info.hidden_size:
        raise InvalidRequestError(
            f"dimensions is {pooling.dimensions}; this model's embeddings have {info.hidden_size}", param="dimensions"
        )


def _check_sampling(sampling: SamplingParams, vocab_size: int) -> None:
    for name, token_ids in (
        ("logit_bias", list(sampling.logit_bias)),
        ("allowed_token_ids", list(sampling.allowed_token_ids or ())),
        ("banned_token_ids", list(sampling.banned_token_ids)),
        ("bad_words", [token_id for sequence in sampling.banned_sequences for token_id in sequence]),
        ("stop_token_ids", list(sampling.stop_token_ids)),
        ("logprob_token_ids", list(sampling.logprob_token_ids)),
        ("labels", list(sampling.pooling.label_token_ids) if sampling.pooling is not None else []),
    ):
        _check_token_ids(name, token_ids, vocab_size)


def _check_token_ids(name: str, token_ids: list[int], vocab_size: int) -> None:
    if token_ids and (min(token_ids) < 0 or max(token_ids) >= vocab_size):
        wrong = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
        raise InvalidRequestError(
            f"{name} names token {wrong}; token ids of this model are 0 to {vocab_size - 1}", param=name
        )


def make_requests(submission: Submission, now_s: float, max_model_len: int) -> list[Request]:
    """One request per sequence; those after the first share the first one's prompt blocks."""
    sampling = submission.sampling
    num_prompt_tokens = len(submission.prompt_token_ids)
    max_num_tokens = min(max_model_len, num_prompt_tokens + (sampling.max_tokens or max_model_len))
    if sampling.pooling is not None:
        max_num_tokens = num_prompt_tokens + 1  # the last is never made, nor has a place
    base_seed = random.getrandbits(63) if sampling.seed is None else sampling.seed
    requests: list[Request] = []
    for index in range(sampling.n):
        request_id = submission.request_id if sampling.n == 1 else f"{submission.request_id}#{index}"
        own_sampling = replace(
            sampling,
            n=1,
            seed=_seed_of(base_seed, index),
            prompt_logprobs=sampling.prompt_logprobs if index == 0 else None,
        )
        requests.append(
            Request(
                request_id=request_id,
                prompt_token_ids=submission.prompt_token_ids,
                sampling=own_sampling,
                arrival_time_s=now_s,
                tenant_id=submission.tenant_id,
                session_id=submission.session_id,
                program_id=submission.program_id or submission.session_id,
                program_arrival_s=now_s,
                cache_salt=submission.cache_salt,
                lora_id=submission.lora_id,
                priority=submission.priority,
                is_background=submission.is_background,
                deadline_s=None if submission.timeout_s is None else now_s + submission.timeout_s,
                parent_id=submission.request_id,
                index=index,
                fork_of=requests[0].request_id if index else None,
                max_num_tokens=max_num_tokens,
            )
        )
    return requests


def _seed_of(base_seed: int, index: int) -> int:
    """Sequence 0 keeps the seed, so that n = 1 and n > 1 agree on it; the others get their own."""
    if index == 0:
        return base_seed
    data = (base_seed % 2**64).to_bytes(8, "little") + index.to_bytes(8, "little")
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little") >> 1
