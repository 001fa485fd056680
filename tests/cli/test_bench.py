import json

from tests.bench.server import FakeServer, running
from tests.cli.run import pelton


async def test_serve_prints_a_table() -> None:
    async with running(FakeServer()) as server:
        result = await pelton("bench", "serve", "--workload", "W1", PELTON_BASE_URL=server.base_url)
    assert result.code == 0
    assert result.err.startswith("W1 server 1/1: ")
    assert result.err.count("\n") == 1
    heading, row = result.out.strip().splitlines()
    assert heading.split()[:3] == ["workload", "out", "tok/s"]
    assert row.split()[0] == "W1"
    assert row.split()[-3:] == ["640", "15", "0"]  # prompt tokens, cached, errors


async def test_serve_json_holds_all_that_a_reader_needs() -> None:
    async with running(FakeServer()) as server:
        arguments = ("--workload", "W1,W5", "--runs", "3", "--seed", "5", "--json")
        result = await pelton("bench", "serve", "--base-url", server.base_url, *arguments)
    document = json.loads(result.out)
    assert document["machine"]["processor"]
    assert (document["seed"], document["exact_prompts"]) == (5, True)
    assert document["servers"]["server"]["model"] == "fake-model"
    w5 = document["workloads"]["W5"]
    assert len(w5["passes"]["server"]) == 3
    assert w5["median"]["server"]["num_prompt_tokens"] == 3 * 4096
    assert w5["median"]["server"]["output_tokens_per_s"] > 0


async def test_errors_are_told_and_exit_code_1() -> None:
    async with running(FakeServer(fault="status", fail_every=3)) as server:
        result = await pelton("bench", "serve", "--workload", "W1", "--base-url", server.base_url)
    assert result.code == 1
    assert "requests failed; the first: HTTP 503: queue is full" in result.err


async def test_compare_prints_medians_and_ratios() -> None:
    async with running(FakeServer()) as a, running(FakeServer()) as b, running(FakeServer()) as c:
        servers = (f"a={a.base_url}", f"b={b.base_url}", f"c={c.base_url}")
        result = await pelton("bench", "compare", *servers, "--workload", "W1", "--passes", "2")
    rows = [line.split() for line in result.out.splitlines()]
    assert [row[1] for row in rows if row[:1] == ["W1"] and row[2] != "/"] == ["a", "b", "c"]
    assert [row[1:4] for row in rows if row[:1] == ["W1"] and row[2] == "/"] == [
        ["a", "/", "b"],
        ["a", "/", "c"],
        ["b", "/", "c"],
    ]


async def test_compare_tells_the_faster_server() -> None:
    async with running(FakeServer()) as fast, running(FakeServer(delay_s=0.002)) as slow:
        servers = (f"fast={fast.base_url}", f"slow={slow.base_url}")
        result = await pelton("bench", "compare", *servers, "--workload", "W5", "--passes", "1", "--json")
    ratios = {ratio["figure"]: ratio for ratio in json.loads(result.out)["workloads"]["W5"]["ratios"]}
    assert ratios["tpot_p50_ms"]["median"] < 1 < ratios["output_tokens_per_s"]["median"]
