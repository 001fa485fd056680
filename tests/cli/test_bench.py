import json
from pathlib import Path

import gguf

from tests.bench.server import FakeServer, running
from tests.cli.run import pelton
from tests.weights.make_models import TINY_CONFIGS, random_tensors, write_gguf


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


def write_tiny(folder: Path) -> str:
    config = TINY_CONFIGS["qwen2"]
    quantized = gguf.GGMLQuantizationType.Q8_0
    return str(write_gguf(folder / "tiny.gguf", config, random_tensors(config), quantized=quantized))


async def test_kernels_prints_ceilings_and_shares(tmp_path: Path) -> None:
    arguments = (write_tiny(tmp_path), "--rows", "1,2", "--contexts", "16", "--threads", "1", "--isa", "portable")
    result = await pelton("bench", "kernels", *arguments, "--json", str(tmp_path / "report.json"))
    assert result.code == 0, result.err
    rows = [line.split() for line in result.out.splitlines()]
    assert ["Kernels:", "portable"] in rows
    assert next(row for row in rows if row[:1] == ["dram,"])[-1] == "GB/s"
    down = next(row for row in rows if row[:1] == ["down"])
    assert down[1:6] == ["64", "x", "96", "Q8_0", "1"]
    assert down[-1].endswith("%")
    document = json.loads((tmp_path / "report.json").read_text())
    assert (document["isa"], document["threads"], document["model"]) == ("portable", 1, "tiny.gguf")
    assert document["machine"]["processor"]
    assert {kernel["kernel"] for kernel in document["kernels"]} >= {"qkv", "attention decode", "sampling, greedy"}


async def test_step_prints_every_part(tmp_path: Path) -> None:
    arguments = (write_tiny(tmp_path), "--decode", "2", "--prefill", "30", "--context", "10", "--isa", "portable")
    result = await pelton(
        "bench", "step", *arguments, "--json", str(tmp_path / "s.json"), PELTON_ENABLE_WEIGHT_CACHE="false"
    )
    assert result.code == 0, result.err
    assert "decode after 10 tokens, 2 requests: " in result.out
    rows = [line.split() for line in result.out.splitlines()]
    assert sum(row[:1] == ["attend"] and row[1] == "3" for row in rows) == 2
    document = json.loads((tmp_path / "s.json").read_text())
    assert document["kernels"] == "native (portable)"
    assert [len(step["parts"]) > 5 for step in document["steps"]] == [True, True]


async def test_kernels_names_what_is_wrong() -> None:
    for arguments, message in (
        (("--rows", "1,many"), "--rows '1,many' is not a list of whole numbers"),
        (("--rows", "0"), "rows must be one number or more, each at least 1"),
    ):
        result = await pelton("bench", "kernels", *arguments)
        assert result.code == 2
        assert message in result.err
