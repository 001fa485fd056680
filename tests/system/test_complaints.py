"""What users of other engines complain about, where nothing else shows it on a real server (docs/complaints.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.system.server import Server, completion, read_events, run_server

pytestmark = pytest.mark.model

SESSION = {"X-Session-Id": "s"}


async def test_a_turn_that_is_broken_off_leaves_its_session_whole(default_model_path: Path, tmp_path: Path) -> None:
    """Without a compiler or any other program in reach: nothing is built on the user's machine.

    A turn is broken off at several places, and sent again: its answer, from the session's KV, is that of a stranger.
    """
    nothing = {"PATH": str(tmp_path), "CC": "false", "CXX": "false"}
    async with run_server(default_model_path, "--num-kv-blocks", "64", env=nothing) as server:
        context = list(range(1000, 1040))
        context += await _tokens(server, context, cache_salt="s")
        for num_seen in (1, 2, 7):
            context += range(2000, 2020)
            body = completion(context, max_tokens=200, stream=True, cache_salt="s")
            async with server.http.post(server.url + "/v1/completions", json=body, headers=SESSION) as response:
                events = read_events(response)
                for _ in range(num_seen):
                    await anext(events)
            answer = await _tokens(server, context, cache_salt="s")
            assert answer == await _tokens(server, context, cache_salt=f"stranger {num_seen}", session="other")
            context += answer
        hits = await server.gauge("vllm:prefix_cache_hits_total")
        assert hits > len(context)  # several turns of it were found
        async with server.http.get(server.url + "/v1/sessions") as response:
            sessions = {item["id"]: item for item in (await response.json())["data"]}
        assert sessions["s"]["num_running"] == 0
        assert sessions["s"]["num_context_tokens"] == len(context)
        await server.wait_idle()


async def _tokens(server: Server, prompt: list[int], *, session: str = "s", **options: Any) -> list[int]:
    body = completion(prompt, max_tokens=12, return_token_ids=True, **options)
    async with server.http.post(
        server.url + "/v1/completions", json=body, headers={"X-Session-Id": session}
    ) as response:
        answer = await response.json()
        assert response.status == 200, answer
        token_ids: list[int] = answer["choices"][0]["token_ids"]
        return token_ids
