"""Agents against an OpenAI-compatible server: transcripts as text, `/v1/completions`, identity where asked for."""

from __future__ import annotations

import random
from typing import Any

from pelton.bench.agent_run import AgentCall
from pelton.bench.agents import Piece
from pelton.bench.client import ServerClient
from pelton.bench.record import RequestRecord
from pelton.bench.workloads import PromptMaker

TENANT_HEADER = "X-Tenant-Id"
SESSION_HEADER = "X-Session-Id"
PROGRAM_HEADER = "X-Program-Id"


class HttpAgentTarget:
    """Implements `AgentTarget`. `send_identity` tells the server tenant, session and program of every request."""

    def __init__(self, client: ServerClient, texts: dict[str, str], *, send_identity: bool = False) -> None:
        self._client = client
        self._texts = texts
        self._send_identity = send_identity

    async def answer(self, call: AgentCall) -> RequestRecord:
        prompt = "".join(self._texts[piece.piece_id] for piece in call.pieces)
        headers: dict[str, str] = {}
        fields: dict[str, Any] = {}
        if self._send_identity:
            headers = {
                TENANT_HEADER: call.tenant_id,
                SESSION_HEADER: call.session_id,
                PROGRAM_HEADER: call.program_id,
            }
            fields = {"prompt_cache_key": call.session_id}
        return await self._client.complete(prompt, call.num_output_tokens, headers=headers, fields=fields)


async def make_texts(maker: PromptMaker, pieces: list[Piece]) -> dict[str, str]:
    """A text for every piece, as long alone as the piece; joined, a token or two may merge at the seams."""
    texts = {}
    for piece in pieces:
        text = await maker.make_text(random.Random(piece.piece_id), piece.num_tokens)
        texts[piece.piece_id] = text.strip() + "\n\n"
    return texts
