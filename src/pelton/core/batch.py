"""The schedule as a value (law 1): what the scheduler decides, and what the worker answers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from pelton.core.output import TokenLogprobs
from pelton.core.sampling_params import SamplingParams

# Stands in `ScheduledRequest.token_ids` for the token that the step in flight is sampling for the
# same request: the worker puts in what it sampled last. Lets a step be scheduled before the one
# ahead of it has finished.
PENDING_TOKEN_ID = -1

# Under which a block's content is known in every tier: KV group, hash of its chain of tokens.
BlockKey = tuple[int, bytes]


class KVOpKind(StrEnum):
    COPY = "copy"  # device block to device block, before the step (copy-on-write)
    LOAD = "load"  # tier to device, before the step
    STORE = "store"  # device to tier, before the step


# Tiers that blocks only pass through: memory of a `KVConnector`, from and to other engines.
INBOX = "inbox"
OUTBOX = "outbox"


@dataclass(frozen=True, slots=True)
class KVOp:
    """One block moved. `source` and `destination` are block ids within their tier; `tier` is the other one."""

    kind: KVOpKind
    source: int
    destination: int
    tier: str = "device"


@dataclass(frozen=True, slots=True)
class RequestContext:
    """What a worker must know of a request that it has not seen, or has forgotten since a preemption."""

    prompt_token_ids: tuple[int, ...]
    output_token_ids: tuple[int, ...]
    seed: int
    lora_id: str = ""  # of its adapter; empty: none


class ScheduledRequest(NamedTuple):
    """One request's share of a step: compute `token_ids` at positions [num_computed_tokens, + len).

    `samples` is true when these tokens reach the request's end, so that the step yields a new token.
    `block_tables` holds one table per KV group; block i of a table covers positions
    [i * block_size, (i + 1) * block_size). A block that has left a sliding window is `NULL_BLOCK_ID`.
    """

    request_id: str
    token_ids: tuple[int, ...]
    num_computed_tokens: int
    block_tables: tuple[tuple[int, ...], ...]
    sampling: SamplingParams
    samples: bool
    draft_token_ids: tuple[int, ...] = ()
    context: RequestContext | None = None


# Never allocated, never read within a window: the place of a block that was given back early.
NULL_BLOCK_ID = 0


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """One step. KV operations come first, one after another, then the forward pass over all requests.

    Operations are plain copies of memory, which do not fail. A batch may hold nothing else.
    """

    step_id: int
    requests: tuple[ScheduledRequest, ...]
    kv_ops: tuple[KVOp, ...] = ()
    preempted_ids: tuple[str, ...] = ()  # the worker forgets these; they come back with a context
    finished_ids: tuple[str, ...] = ()  # ended since the last batch; the worker forgets these

    @property
    def num_tokens(self) -> int:
        return sum(len(request.token_ids) for request in self.requests)


@dataclass(frozen=True, slots=True)
class StepResult:
    """Answer to one batch; every tuple is aligned with `ScheduledBatch.requests`.

    `sampled_token_ids[i]` is empty for a request that did not reach its end. `prompt_logprobs[i]`
    covers the prompt positions p of this step with a successor in the prompt: entry j is the logprobs
    of prompt token num_computed_tokens + j + 1.
    """

    step_id: int
    sampled_token_ids: tuple[tuple[int, ...], ...]
    logprobs: tuple[tuple[TokenLogprobs, ...] | None, ...] = ()
    prompt_logprobs: tuple[tuple[TokenLogprobs, ...] | None, ...] = ()
    num_accepted: tuple[int, ...] = ()
    # request_id -> float32 values, little-endian, of the pooling requests whose last token this step computed
    pooled: dict[str, bytes] | None = None
    complete_ids: tuple[str, ...] = ()  # requests whose grammar lets nothing follow what was just sampled
    # request_id -> what went wrong with that request alone (for example NaN logits)
    failed: dict[str, str] | None = None
    elapsed_s: float = 0.0
    kv_copy_s: float = 0.0  # of it, in KV operations that its computing waited for
    kv_moved_s: float | None = None  # that all of them took, where a device does some beside the step
