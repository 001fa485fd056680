"""Agents as load: plans of turns, tool pauses and forks, drawn from a seed before anything is sent.

An agent's prompt only grows: a system prompt that it shares with all agents of its app, its task, then turn by turn
the answer and what a tool said. What a plan says the model answered stands in the next prompt, whatever the server
really answered: every server, every policy and the simulator thus get the same prompts.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from pelton.core.errors import ConfigError
from pelton.core.request import DEFAULT_TENANT


@dataclass(frozen=True, slots=True)
class Spread:
    """Lognormal by its median and sigma, at most `limit`; sigma 0 is the median always."""

    median: float
    sigma: float
    limit: float = math.inf

    def draw(self, rng: random.Random) -> float:
        return min(self.limit, self.median * math.exp(rng.gauss(0.0, self.sigma)))

    def draw_count(self, rng: random.Random) -> int:
        return max(1, round(self.draw(rng)))


@dataclass(frozen=True, slots=True)
class Tool:
    """`share` of all calls, relative to the other tools'."""

    name: str
    share: float
    pause_s: Spread


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentWorkload:
    """Closed loop: `num_concurrent` agents run at any time until all `num_agents` have ended.

    With `fork_share`, that share of the agents sends out sub-agents, once: they start from the parent's transcript,
    each with a task of its own, and the parent waits for the last of them.
    """

    name: str
    description: str
    num_agents: int
    num_concurrent: int
    num_turns: Spread
    num_system_tokens: int
    num_task_tokens: Spread
    num_tool_tokens: Spread
    num_output_tokens: Spread
    tools: tuple[Tool, ...]
    num_apps: int = 1  # each has a system prompt of its own
    tenants: tuple[str, ...] = (DEFAULT_TENANT,)  # agents are dealt to them in turn
    fork_share: float = 0.0
    num_forks: int = 2
    num_fork_turns: Spread = Spread(4, 0.4)
    max_prompt_tokens: int = 131_072  # an agent that comes near it ends early
    ramp_s: float = 0.0  # the first agents start within this time

    def __post_init__(self) -> None:
        if min(self.num_agents, self.num_concurrent, self.num_apps, len(self.tenants)) < 1:
            raise ConfigError("agents, concurrent agents, apps and tenants must be at least 1")
        if not 0 <= self.fork_share <= 1:
            raise ConfigError(f"the share of agents that fork is {self.fork_share}; it must be between 0 and 1")


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of a transcript: equal ids are equal texts."""

    piece_id: str
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Turn:
    """Add `new`, ask for `num_output_tokens`, add `answer`; then run a tool for `pause_s`, or the forks."""

    new: Piece
    answer: Piece
    pause_s: float
    tool: str
    forks: tuple[AgentPlan, ...] = ()

    @property
    def num_output_tokens(self) -> int:
        return self.answer.num_tokens


@dataclass(frozen=True, slots=True)
class AgentPlan:
    """`program_id` is the agent's own id, or that of the agent whose fork it is."""

    agent_id: str
    program_id: str
    tenant_id: str
    system: Piece | None  # None: goes on from its parent's transcript
    start_s: float
    turns: tuple[Turn, ...]


@dataclass(slots=True)
class _Transcript:
    """Room left while a plan is drawn."""

    num_tokens: int
    limit: int

    def has_room(self, turn: Turn) -> bool:
        self.num_tokens += turn.new.num_tokens + turn.num_output_tokens
        return self.num_tokens <= self.limit


# Shapes (sigmas) are those of follow-up turns in the Mooncake conversation trace (`benchmarks/fit_agents.py`): new
# tokens p10/p50/p90 65/472/4,617, outputs 28/356/633. Medians and pauses are those published for coding agents:
# 43 turns, 444 tokens out, a prompt that ends near 100K tokens; 86% of tools return within 1 s, 95% within 10 s.
_TOOLS = (Tool("read", 0.86, Spread(0.2, 0.7)), Tool("run", 0.14, Spread(4.0, 1.3, 120.0)))
AGENT_WORKLOADS: dict[str, AgentWorkload] = {
    workload.name: workload
    for workload in (
        AgentWorkload(
            name="coding",
            description="coding agents as published: for a GPU, or the virtual clock",
            num_agents=64,
            num_concurrent=16,
            num_turns=Spread(43, 0.5, 120),
            num_system_tokens=12_000,
            num_task_tokens=Spread(1_500, 1.0, 8_000),
            num_tool_tokens=Spread(670, 1.6, 16_000),
            num_output_tokens=Spread(330, 0.8, 2_000),
            tools=_TOOLS,
            num_apps=2,
            fork_share=0.44,
            ramp_s=10.0,
        ),
        AgentWorkload(
            name="coding-small",
            description="the same, a twentieth of the tokens: for a small model on a CPU",
            num_agents=24,
            num_concurrent=8,
            num_turns=Spread(10, 0.4, 24),
            num_system_tokens=512,
            num_task_tokens=Spread(96, 0.8, 400),
            num_tool_tokens=Spread(64, 1.2, 512),
            num_output_tokens=Spread(20, 0.6, 64),
            tools=(Tool("read", 0.7, Spread(0.4, 0.7)), Tool("run", 0.3, Spread(4.0, 0.8, 20.0))),
            fork_share=0.25,
            num_fork_turns=Spread(3, 0.3),
            max_prompt_tokens=6_000,
            ramp_s=4.0,
        ),
        AgentWorkload(
            name="smoke",
            description="a few short agents, to see that all works",
            num_agents=4,
            num_concurrent=2,
            num_turns=Spread(3, 0.0),
            num_system_tokens=128,
            num_task_tokens=Spread(32, 0.0),
            num_tool_tokens=Spread(32, 0.5, 128),
            num_output_tokens=Spread(8, 0.0),
            tools=(Tool("read", 1.0, Spread(0.1, 0.5)),),
            fork_share=0.5,
            num_fork_turns=Spread(2, 0.0),
            max_prompt_tokens=2_000,
        ),
    )
}


def select_agent_workload(name: str, *, agents: int | None = None, concurrency: int | None = None) -> AgentWorkload:
    """By name, with other counts where they are given. Raises `ConfigError`."""
    if name not in AGENT_WORKLOADS:
        raise ConfigError(f"there is no agent workload {name!r}; there are {', '.join(AGENT_WORKLOADS)}")
    workload = AGENT_WORKLOADS[name]
    workload = replace(workload, num_concurrent=concurrency or workload.num_concurrent)
    return replace(workload, num_agents=agents or workload.num_agents)


@dataclass(slots=True)
class _Planner:
    workload: AgentWorkload
    seed: str
    rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.rng = random.Random(f"{self.seed}/{self.workload.name}")

    def agents(self) -> Iterator[AgentPlan]:
        workload, rng = self.workload, self.rng
        for number in range(workload.num_agents):
            agent_id = f"{self.seed}/agent-{number}"
            app = rng.randrange(workload.num_apps)
            system = Piece(f"{self.seed}/app-{app}", workload.num_system_tokens)
            forks = rng.random() < workload.fork_share
            start_s = rng.uniform(0, workload.ramp_s) if number < workload.num_concurrent else 0.0
            tenant_id = workload.tenants[number % len(workload.tenants)]
            transcript = _Transcript(system.num_tokens, workload.max_prompt_tokens)
            num_turns = workload.num_turns.draw_count(rng)
            fork_turn = rng.randrange(num_turns - 1) if forks and num_turns > 1 else None
            turns = self._turns(agent_id, num_turns, transcript, fork_turn, tenant_id)
            yield AgentPlan(agent_id, agent_id, tenant_id, system, start_s, turns)

    def _turns(
        self, agent_id: str, num_turns: int, transcript: _Transcript, fork_turn: int | None, tenant_id: str
    ) -> tuple[Turn, ...]:
        turns: list[Turn] = []
        for number in range(num_turns):
            turn = self._turn(f"{agent_id}/{number}", is_first=number == 0)
            if not transcript.has_room(turn) and turns:
                break
            if number == fork_turn:
                turn = replace(turn, forks=self._forks(agent_id, transcript, tenant_id))
            turns.append(turn)
        return tuple(turns)

    def _turn(self, turn_id: str, *, is_first: bool) -> Turn:
        workload, rng = self.workload, self.rng
        new = workload.num_task_tokens if is_first else workload.num_tool_tokens
        (tool,) = rng.choices(workload.tools, [tool.share for tool in workload.tools])
        return Turn(
            Piece(f"{turn_id}/new", new.draw_count(rng)),
            Piece(f"{turn_id}/answer", workload.num_output_tokens.draw_count(rng)),
            tool.pause_s.draw(rng),
            tool.name,
        )

    def _forks(self, agent_id: str, transcript: _Transcript, tenant_id: str) -> tuple[AgentPlan, ...]:
        forks = []
        for number in range(self.workload.num_forks):
            fork_id = f"{agent_id}/fork-{number}"
            own = _Transcript(transcript.num_tokens, transcript.limit)
            turns = self._turns(fork_id, self.workload.num_fork_turns.draw_count(self.rng), own, None, tenant_id)
            forks.append(AgentPlan(fork_id, agent_id, tenant_id, None, 0.0, turns))
        return tuple(forks)


def plan_agents(workload: AgentWorkload, seed: str) -> list[AgentPlan]:
    """The same `seed` gives the same plans; no piece of text is shared between seeds."""
    return list(_Planner(workload, seed).agents())


def all_turns(plans: list[AgentPlan]) -> Iterator[Turn]:
    """Those of forks too."""
    for plan in plans:
        for turn in plan.turns:
            yield turn
            yield from all_turns(list(turn.forks))


def all_pieces(plans: list[AgentPlan]) -> Iterator[Piece]:
    """Every piece of text once."""
    seen = set[str]()
    for plan in plans:
        if plan.system is not None and plan.system.piece_id not in seen:
            seen.add(plan.system.piece_id)
            yield plan.system
    for turn in all_turns(plans):
        yield turn.new
        yield turn.answer
