"""`Request`: the one identity of a generation from admission to its end. Changed only in `engine/`."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from pelton.core.sampling_params import SamplingParams

DEFAULT_TENANT = "default"
# What one unit of priority is worth in waiting, and all of it at most: nobody waits for ever (law 6).
PRIORITY_UNIT_S = 1.0
MAX_PRIORITY_S = 600.0


class RequestStatus(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """One sequence. A submission with n > 1 becomes n requests that share `parent_id`.

    There is no phase flag (law 2): a request wants `num_tokens - num_computed_tokens` tokens
    computed, whether that is a prompt, a chunk of it, one decode or a recompute after preemption.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    arrival_time_s: float
    tenant_id: str = DEFAULT_TENANT
    session_id: str | None = None
    program_id: str | None = None  # the agent run that this call belongs to
    program_arrival_s: float = 0.0  # when that began
    cache_salt: str = ""
    lora_id: str = ""  # of the adapter that it runs with; part of every block's hash
    priority: int = 0  # lower runs first, as in vLLM
    is_background: bool = False
    deadline_s: float | None = None  # on the engine's clock
    parent_id: str | None = None  # the submission, where n > 1
    index: int = 0  # which of the n
    fork_of: str | None = None  # sibling whose prompt blocks this one shares

    status: RequestStatus = RequestStatus.WAITING
    finish_reason: FinishReason | None = None
    output_token_ids: list[int] = field(default_factory=list)
    draft_token_ids: list[int] = field(default_factory=list)
    # Tokens that a step in flight will sample: they exist, their ids are not known yet.
    num_pending_tokens: int = 0
    num_steps_in_flight: int = 0
    num_computed_tokens: int = 0  # positions whose KV exists or is being computed by a step in flight
    num_writable_tokens: int = 0  # positions below lie in blocks that it has; the last of them is its own
    num_kv_tokens: int = 0  # slots held; differs from num_computed_tokens once KV is evicted or merged
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache at first admission
    num_preemptions: int = 0
    num_lost_tokens: int = 0  # computed tokens given up by the last preemption
    num_charged_tokens: int = 0  # prompt positions whose computation its tenant has been charged for
    num_overtaken: int = 0  # requests behind it that were admitted while it found no room
    num_prompt_logprobs: int = 0  # prompt positions whose logprobs the client has
    block_tables: list[list[int]] = field(default_factory=list)  # one per KV group
    # As the last batch carried them; None once they have changed.
    scheduled_block_tables: tuple[tuple[int, ...], ...] | None = None
    block_hashes: list[bytes] = field(default_factory=list)  # chain over full blocks of known tokens
    generation: int = 0  # turns that the chain it goes on from has had
    # What the last preemption kept findable, for this request alone where a hash is not one of `block_hashes`.
    kept_hashes: list[bytes] = field(default_factory=list)
    num_kept_tokens: int = 0
    prefix_memo: object = None  # the KV manager's, of the last prefix match while the request waits
    max_num_tokens: int = 0  # prompt + output at most; resolved from max_tokens and the context at admission

    @property
    def rank_time_s(self) -> float:
        """Its arrival as far as order goes: a higher priority number stands further back, within bounds."""
        if not self.priority:
            return self.arrival_time_s
        return self.arrival_time_s + max(-MAX_PRIORITY_S, min(MAX_PRIORITY_S, PRIORITY_UNIT_S * self.priority))

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.output_token_ids)

    @property
    def num_known_tokens(self) -> int:
        """Tokens whose ids are known."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_tokens(self) -> int:
        """Known tokens and those that a step in flight will sample."""
        return len(self.prompt_token_ids) + len(self.output_token_ids) + self.num_pending_tokens

    @property
    def num_remaining_tokens(self) -> int:
        """Tokens that still want computing."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def is_finished(self) -> bool:
        return self.status is RequestStatus.FINISHED

    def known_token_ids(self, start: int, end: int) -> list[int]:
        """Known ids of positions [start, end), across prompt and output."""
        num_prompt = len(self.prompt_token_ids)
        if end <= num_prompt:
            return self.prompt_token_ids[start:end]
        if start >= num_prompt:
            return self.output_token_ids[start - num_prompt : end - num_prompt]
        return self.prompt_token_ids[start:] + self.output_token_ids[: end - num_prompt]


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """What a client hands to the engine: `sampling.n` sequences over one prompt."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    tenant_id: str = DEFAULT_TENANT
    session_id: str | None = None
    program_id: str | None = None  # the agent run that this call belongs to; None: the session
    previous_request_id: str | None = None  # names the session by an earlier answer, where session_id is None
    tool_names: tuple[str, ...] = ()  # of the tools whose results the prompt ends with
    cache_salt: str = ""  # requests share cached prefixes only with those of equal tenant salt
    lora_id: str = ""  # of a loaded adapter; empty: the model alone
    priority: int = 0
    timeout_s: float | None = None  # from the moment the engine receives it
    is_background: bool = False  # most steps go without it while others have work (a batch's line)
