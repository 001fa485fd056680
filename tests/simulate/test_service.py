import asyncio

import pytest

from pelton.simulate.server import SimulatedServer
from pelton.simulate.service import ServiceLog
from tests.simulate.make import run, submission


@pytest.mark.parametrize("num_kv_blocks", [200, 14])
def test_service_is_what_was_asked_for_however_often_it_was_computed(num_kv_blocks: int) -> None:
    async def main(server: SimulatedServer) -> ServiceLog:
        log = ServiceLog(server.engine.scheduler.requests)
        server.executor.listeners.append(log)
        requests = [submission(20 + n, 40, tenant_id="ab"[n % 2]) for n in range(8)]
        await asyncio.gather(*(server.submit(request) for request in requests))
        return log

    log, now_s, server = run(main, num_kv_blocks=num_kv_blocks, block_size=16, enable_overlap=False)
    assert (server.stats.num_preemptions_total > 0) == (num_kv_blocks == 14)
    assert log.tenant_ids == ["a", "b"]
    for tenant_id, offset in (("a", 0), ("b", 1)):
        num_prompt_tokens = sum(20 + n for n in range(offset, 8, 2))
        assert log.total(tenant_id, now_s) == num_prompt_tokens + 2 * 4 * 40
    assert log.total("a", 0.5) == 0
    assert log.total("nobody", now_s) == 0


def test_cached_tokens_are_no_service() -> None:
    async def main(server: SimulatedServer) -> ServiceLog:
        log = ServiceLog(server.engine.scheduler.requests)
        server.executor.listeners.append(log)
        first = submission(65, 1, tenant_id="first")
        await server.submit(first)
        second = submission(0, 1, tenant_id="second")
        second.prompt_token_ids.extend(first.prompt_token_ids)
        await server.submit(second)
        return log

    log, now_s, _ = run(main)
    assert (log.total("first", now_s), log.total("second", now_s)) == (65 + 2, 1 + 2)
