"""Simulated servers for tests: a small machine whose step times are easy to add up."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from pelton.build import build_simulated_server
from pelton.core.request import Submission
from pelton.engine.config import EngineConfig
from pelton.simulate.clock import VirtualClock, run_virtual
from pelton.simulate.cost import StepCost
from pelton.simulate.server import SimulatedServer
from tests.make import make_submission

Result = TypeVar("Result")

# A step takes 1 s, and a tenth of a second for every token after the first.
PLAIN = StepCost(name="plain", knots=((1, 1.0), (11, 2.0)), num_kv_tokens=4096)


def run(
    main: Callable[[SimulatedServer], Awaitable[Result]], cost: StepCost = PLAIN, **settings: Any
) -> tuple[Result, float, SimulatedServer]:
    """What `main` gives, the virtual time when it did, and the server."""
    clock = VirtualClock()

    async def start() -> tuple[Result, SimulatedServer]:
        server = build_simulated_server(EngineConfig(**settings), cost)
        return await main(server), server

    result, server = run_virtual(start(), clock)
    return result, clock.now_s(), server


def submission(num_prompt_tokens: int, num_output_tokens: int, **options: Any) -> Submission:
    """Of a prompt that no other has."""
    made = make_submission([], max_tokens=num_output_tokens, ignore_eos=True, **options)
    made.prompt_token_ids.extend([int(made.request_id.lstrip("r")) + 1] * num_prompt_tokens)
    return made
