"""Sessions of the real server and model, in a cache that is too small for them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.system.server import Server, completion, run_server

pytestmark = pytest.mark.model
# 279 blocks of 16 tokens: two contexts of about 1,700 tokens and not a third. One thread and no host memory
# behind the cache, so that it takes seconds to have a context back and keeping it pays.
FLAGS = (
    *("--num-kv-blocks", "280", "--tenant", "*:max_pin_share=1", "--max-num-seqs", "8"),
    *("--threads", "1", "--host-kv-cache-gb", "0"),
)
QUESTIONS = ("What does it do?", "Write a test for it.")


def context_of(name: str) -> str:
    return "".join(f"def {name}_{index}(x):\n    return x + {index}\n\n" for index in range(100))


async def converse(server: Server, name: str, **headers: str) -> list[str]:
    """The answers of an agent's turns; with a session's name in the headers or without."""
    prompt, answers = context_of(name), []
    for question in QUESTIONS:
        prompt += f"# {question}\n"
        body = completion(prompt, max_tokens=12)
        async with server.http.post(server.url + "/v1/completions", json=body, headers=headers) as response:
            answer: dict[str, Any] = await response.json()
            assert response.status == 200, answer
        answers.append(answer["choices"][0]["text"])
        prompt += answers[-1]
    return answers


async def sessions(server: Server, tenant: str) -> list[dict[str, Any]]:
    async with server.http.get(server.url + "/v1/sessions", headers={"X-Tenant-Id": tenant}) as response:
        return list((await response.json())["data"])


async def test_agents_in_a_cache_full_of_pins(default_model_path: Path) -> None:
    """All progress, their answers are those of agents alone, and hung tools give everything back in time."""
    async with run_server(default_model_path, *FLAGS) as server:
        agents = [("t1", "a"), ("t1", "b"), ("t2", "c")]
        together = await asyncio.gather(
            *(
                converse(server, name, **{"X-Tenant-Id": tenant, "X-Session-Id": f"agent-{name}"})
                for tenant, name in agents
            )
        )
        # The tools of all hang. Nothing else happens: time alone has to end the pins.
        async with asyncio.timeout(120):
            while await server.gauge("pelton:pins") or await server.gauge("vllm:kv_cache_usage_perc"):
                await asyncio.sleep(0.1)
        assert await server.gauge("pelton:pins_ended_total") >= len(agents)
        for tenant, num_agents in (("t1", 2), ("t2", 1)):
            assert [info["num_turns"] for info in await sessions(server, tenant)] == [2] * num_agents
        assert await sessions(server, "t3") == []
        # One at a time, of a tenant that has no sessions: no pin, no pressure.
        alone = [await converse(server, name, **{"X-Tenant-Id": "t3"}) for _, name in agents]
    assert together == alone
