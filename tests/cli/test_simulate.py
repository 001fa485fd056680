import json
from pathlib import Path

from pelton.simulate.cost import COSTS, StepShape, load_cost
from tests.bench.server import FakeServer, running
from tests.cli.run import pelton
from tests.simulate.test_trace import write

ENGINE = ("--max-num-seqs", "8", "--num-kv-blocks", "2000")


async def test_trace_prints_a_row_for_every_policy(tmp_path: Path) -> None:
    result = await pelton("simulate", "trace", "--file", str(write(tmp_path)), "--policies", "fcfs,priority", *ENGINE)
    assert result.code == 0, result.err
    heading, *rows = [line.split() for line in result.out.strip().splitlines()]
    assert heading[:3] == ["policy", "requests", "virtual"]
    assert [row[:2] for row in rows] == [["fcfs", "4"], ["priority", "4"]]


async def test_agents_json_holds_reports_by_load() -> None:
    result = await pelton("simulate", "agents", "--workload", "smoke", "--loads", "1,3", "--json", *ENGINE)
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert [report["num_concurrent"] for report in document["reports"]] == [1, 3]
    assert all(report["num_errors"] == 0 and report["num_turns"] > 10 for report in document["reports"])


async def test_calibrate_writes_a_cost_that_simulate_takes(tmp_path: Path) -> None:
    true = COSTS["h100-8b"]
    shapes = [StepShape(n % 300 + 1, 1, 50 * n if n % 2 else 0, 0) for n in range(400)]
    lines = [
        json.dumps({"shape": {**{f: getattr(s, f) for f in s.__struct_fields__}}, "elapsed_s": true.step_s(s)})
        for s in shapes
    ]
    (tmp_path / "steps.jsonl").write_text("\n".join(lines) + "\n")
    output = str(tmp_path / "cost.json")
    result = await pelton("simulate", "calibrate", str(tmp_path / "steps.jsonl"), "--output", output)
    assert result.code == 0, result.err
    assert "400 steps" in result.out
    cost = load_cost(output)
    assert abs(cost.base_s(200) / true.base_s(200) - 1) < 0.05
    result = await pelton("simulate", "agents", "--workload", "smoke", "--cost", output)
    assert result.code == 0, result.err


async def test_mistakes_are_usage_errors(tmp_path: Path) -> None:
    for arguments, problem in (
        (("trace", "--file", str(tmp_path / "none")), "cannot be read"),
        (("agents", "--cost", "none"), "there is no cost 'none'"),
        (("agents", "--workload", "none"), "there is no agent workload"),
        (("agents", "--loads", "1,x"), "not a list of whole numbers"),
        (("agents", "--policies", "fcfs,none"), "'none' is none of"),
    ):
        result = await pelton("simulate", *arguments)
        assert result.code == 2, (arguments, result.err)
        assert problem in result.err


async def test_bench_agents_prints_a_table() -> None:
    async with running(FakeServer()) as server:
        result = await pelton(
            "bench", "agents", "--workload", "smoke", "--loads", "1,2", PELTON_BASE_URL=server.base_url
        )
    assert result.code == 0, result.err
    heading, *rows = [line.split() for line in result.out.strip().splitlines()]
    assert heading[:2] == ["workload", "agents"]
    assert [row[:3] for row in rows] == [["smoke", "4", "1"], ["smoke", "4", "2"]]
    assert result.err.startswith("1 at a time: jobs take ")
