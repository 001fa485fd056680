"""What identifies a conversation: `Session`, its `Turn`s, and `TurnIndex`, which finds the turn before a prompt.

A prompt that goes on after the whole prompt of an earlier turn, token by token, continues that turn. The
output in between need not agree: templates write it in their own way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from pelton.core.request import Request
from pelton.engine.kv.pins import Pin

MAX_TURNS_ALIKE = 16  # with equal prompts


@dataclass(slots=True, eq=False)
class Program:
    """An agent run: sessions that belong together."""

    program_id: str
    arrival_s: float


@dataclass(slots=True, eq=False)
class Session:
    tenant_id: str
    session_id: str
    program: Program
    is_inferred: bool
    created_s: float
    used_s: float
    turns: deque[Turn] = field(default_factory=deque)
    num_turns: int = 0
    num_running: int = 0
    is_forgotten: bool = False
    _tool_names: set[str | None] = field(default_factory=set)

    @property
    def comes_back(self) -> bool:
        """Whether more turns are to be expected: it is named by its client, or has come back before."""
        return not self.is_inferred or self.num_turns > 1

    @property
    def tool_name(self) -> str | None:
        """What it will wait for next: known where that has been the same every time."""
        return next(iter(self._tool_names)) if len(self._tool_names) == 1 else None

    def add_tool(self, name: str | None) -> None:
        if len(self._tool_names) < 2:
            self._tool_names.add(name)


@dataclass(slots=True, eq=False)
class Turn:
    """One that has ended."""

    session: Session
    request_id: str
    num_prompt_tokens: int
    tip_hash: bytes  # chain hash of the prompt's last full block; empty: there is none
    tail: Sequence[int]  # prompt tokens after that
    end_hash: bytes  # chain hash of the last full block, output included
    num_end_blocks: int
    num_tokens: int
    ended_s: float
    pin: Pin | None = None
    is_continued: bool = False

    @classmethod
    def of(cls, session: Session, request: Request, block_size: int, ended_s: float) -> Turn:
        hashes = request.block_hashes
        num_tip_blocks = min(request.num_prompt_tokens // block_size, len(hashes))
        return cls(
            session,
            request.parent_id or request.request_id,
            request.num_prompt_tokens,
            tip_hash=hashes[num_tip_blocks - 1] if num_tip_blocks else b"",
            tail=request.prompt_token_ids[num_tip_blocks * block_size :] if num_tip_blocks else (),
            end_hash=hashes[-1] if hashes else b"",
            num_end_blocks=len(hashes),
            num_tokens=request.num_known_tokens,
            ended_s=ended_s,
        )

    def has_output_in(self, hashes: Sequence[bytes]) -> bool:
        """Whether a prompt with these block hashes repeats the output too."""
        return 0 < self.num_end_blocks <= len(hashes) and hashes[self.num_end_blocks - 1] == self.end_hash


class TurnIndex:
    """Turns by the end of their prompt, and by request id."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._by_tip: dict[bytes, list[Turn]] = {}
        self._by_request: dict[str, Turn] = {}

    def add(self, turn: Turn) -> None:
        self._by_request[turn.request_id] = turn
        if turn.tip_hash:
            alike = self._by_tip.setdefault(turn.tip_hash, [])
            alike.append(turn)
            if len(alike) > MAX_TURNS_ALIKE:
                del alike[0]

    def remove(self, turn: Turn) -> None:
        if self._by_request.get(turn.request_id) is turn:
            del self._by_request[turn.request_id]
        alike = self._by_tip.get(turn.tip_hash, [])
        if turn in alike:
            alike.remove(turn)
        if not alike:
            self._by_tip.pop(turn.tip_hash, None)

    def of_request(self, tenant_id: str, request_id: str) -> Turn | None:
        """The turn that a tenant's request was."""
        turn = self._by_request.get(request_id)
        return turn if turn is not None and turn.session.tenant_id == tenant_id else None

    def match(self, request: Request, session: Session | None) -> Turn | None:
        """The longest turn, of `session` if that is given, after whose whole prompt the request goes on.

        Of several with one prompt: one whose output is repeated too, that is not continued yet, the latest.
        """
        hashes = request.block_hashes
        for index in range(len(hashes) - 1, -1, -1):
            alike = self._by_tip.get(hashes[index])
            if alike is None:
                continue
            end = (index + 1) * self._block_size
            fitting = [
                turn
                for turn in alike
                if turn.session.tenant_id == request.tenant_id
                and (session is None or turn.session is session)
                and turn.num_prompt_tokens < request.num_prompt_tokens
                and request.prompt_token_ids[end : end + len(turn.tail)] == turn.tail
            ]
            if fitting:
                return max(fitting, key=lambda turn: (turn.has_output_in(hashes), not turn.is_continued, turn.ended_s))
        return None
