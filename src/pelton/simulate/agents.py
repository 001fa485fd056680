"""Agents on virtual time: the plans and the driver of `bench/`, answered by the production engine."""

from __future__ import annotations

from zlib import crc32

from pelton.bench.agent_run import AgentCall, AgentRecord, AgentRunner
from pelton.bench.agents import AgentPlan, Piece
from pelton.bench.record import RequestRecord
from pelton.core.request import Submission
from pelton.core.sampling_params import SamplingParams
from pelton.simulate.executor import VOCAB_SIZE
from pelton.simulate.server import SimulatedServer


class SimulatedAgentTarget:
    """Implements `AgentTarget`. A piece is as many tokens as it has, all of one id that follows from its name."""

    def __init__(self, server: SimulatedServer) -> None:
        self._server = server

    async def answer(self, call: AgentCall) -> RequestRecord:
        token_ids: list[int] = []
        for piece in call.pieces:
            token_ids += [_token_id(piece)] * piece.num_tokens
        submission = Submission(
            request_id=f"{call.session_id}#{call.number}",
            prompt_token_ids=token_ids,
            sampling=SamplingParams(temperature=0.0, max_tokens=call.num_output_tokens, ignore_eos=True),
            tenant_id=call.tenant_id,
            session_id=call.session_id,
            program_id=call.program_id,
            cache_salt=call.tenant_id,
        )
        return await self._server.submit(submission)


def _token_id(piece: Piece) -> int:
    return crc32(piece.piece_id.encode()) % VOCAB_SIZE


async def run_agents(server: SimulatedServer, plans: list[AgentPlan], num_concurrent: int) -> list[AgentRecord]:
    return await AgentRunner(SimulatedAgentTarget(server)).run(plans, num_concurrent)
