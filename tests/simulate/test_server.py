"""The production engine on virtual time: what can be added up by hand comes out to the microsecond."""

import asyncio

import pytest

from pelton.bench.record import RequestRecord
from pelton.simulate.server import SimulatedServer
from tests.simulate.make import PLAIN, run, submission


def test_one_request_takes_the_sum_of_its_steps() -> None:
    async def main(server: SimulatedServer) -> RequestRecord:
        return await server.submit(submission(11, 4))

    record, now_s, server = run(main)
    # 11 tokens in 2 s, then three tokens of 1 s each.
    assert record.chunk_times_s == pytest.approx((2.0, 3.0, 4.0, 5.0))
    assert (record.elapsed_s, now_s) == pytest.approx((5.0, 5.0))
    assert (record.num_prompt_tokens, record.num_output_tokens, record.num_cached_tokens) == (11, 4, 0)
    assert server.executor.busy_s == pytest.approx(5.0)


def test_chunks_follow_the_token_budget() -> None:
    async def main(server: SimulatedServer) -> RequestRecord:
        return await server.submit(submission(22, 1))

    record, _, server = run(main, max_num_seqs=4, max_num_batched_tokens=11)
    assert record.ttft_s == pytest.approx(4.0)
    assert server.stats.num_steps_total == 2


def test_first_come_first_served_is_a_queue() -> None:
    """One at a time, all at once: the n-th waits for n - 1 others (what M/D/1 comes to for a burst)."""

    async def main(server: SimulatedServer) -> list[RequestRecord]:
        return await asyncio.gather(*(server.submit(submission(11, 2)) for _ in range(5)))

    records, _, _ = run(main, max_num_seqs=1, enable_overlap=False)
    assert [record.elapsed_s for record in records] == pytest.approx([3.0, 6.0, 9.0, 12.0, 15.0])


def test_overlap_changes_no_time_of_a_lone_request() -> None:
    async def main(server: SimulatedServer) -> RequestRecord:
        return await server.submit(submission(20, 10))

    times = [run(main, enable_overlap=overlap)[0].chunk_times_s for overlap in (True, False)]
    assert times[0] == pytest.approx(times[1])


def test_a_deadline_passes_in_virtual_time() -> None:
    async def main(server: SimulatedServer) -> RequestRecord:
        return await server.submit(submission(11, 1000, timeout_s=7.5))

    record, now_s, server = run(main)
    assert record.error is not None
    assert "deadline" in record.error
    assert now_s == pytest.approx(7.5)
    assert server.engine.scheduler.kv.pool.num_used == 0


def test_a_refused_request_has_an_error() -> None:
    async def main(server: SimulatedServer) -> RequestRecord:
        return await server.submit(submission(100, 1))

    record, _, _ = run(main, num_kv_blocks=5)
    assert record.error is not None
    assert "context" in record.error


def test_the_same_world_twice() -> None:
    async def main(server: SimulatedServer) -> list[RequestRecord]:
        return await asyncio.gather(*(server.submit(submission(30 + n, 20)) for n in range(20)))

    first, second = (run(main, num_kv_blocks=30, max_num_seqs=8)[0] for _ in range(2))
    assert [record.chunk_times_s for record in first] == [record.chunk_times_s for record in second]


def test_times_can_be_left_out() -> None:
    async def main(server: SimulatedServer) -> RequestRecord:
        return await server.submit(submission(11, 4), keep_times=False)

    record, _, _ = run(main)
    assert record.chunk_times_s == pytest.approx((2.0, 5.0))
    assert record.tpot_s == pytest.approx(1.0)


def test_answers_share_no_blocks_and_continued_ones_do() -> None:
    """A second request over prompt and answer of the first finds both; a twin of the first finds the prompt only."""

    async def main(server: SimulatedServer) -> list[RequestRecord]:
        first = submission(64, 64)
        await server.submit(first)
        output = server.executor._tokens[first.request_id] * 64
        longer, twin = submission(0, 1), submission(0, 1)
        longer.prompt_token_ids.extend([*first.prompt_token_ids, *output, 7])
        twin.prompt_token_ids.extend([*first.prompt_token_ids, *[7] * 64])
        return [await server.submit(longer), await server.submit(twin)]

    records, _, _ = run(main, PLAIN)
    # The last token of the answer was never computed, so its block is not there.
    assert [record.num_cached_tokens for record in records] == [112, 64]
