from pathlib import Path

import pytest

from pelton.core.errors import ConfigError
from pelton.simulate.cost import StepShape
from pelton.simulate.step_log import StepLogExecutor, read_step_log
from tests.make import ContextExecutor, generate, make_engine, make_submission


def test_every_step_of_a_live_engine_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    executor = StepLogExecutor(ContextExecutor(in_thread=True, delay_s=0.002), path, 4)
    engine = make_engine(executor=executor)
    generate(engine, make_submission(range(10), max_tokens=3, ignore_eos=True))
    executor.close()
    steps = read_step_log([path])
    assert [step.shape for step in steps[:3]] == [
        StepShape(10, 1, 0, 55),
        StepShape(1, 1, 11, 0),
        StepShape(1, 1, 12, 0),
    ]
    assert all(step.elapsed_s >= 0.002 for step in steps)


def test_a_failed_step_is_left_out_and_a_cut_line_too(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    inner = ContextExecutor()
    executor = StepLogExecutor(inner, path, 4)
    engine = make_engine(executor=executor, enable_overlap=False)
    inner.fail_next = RuntimeError("broken")
    engine.submit(make_submission(range(4)))
    engine.dispatch()
    engine.collect()
    engine.take_update()
    generate(engine, make_submission(range(10), max_tokens=2))
    executor.close()
    whole = read_step_log([path])
    path.write_bytes(path.read_bytes() + b'{"shape": {"num_to')
    assert read_step_log([path]) == whole
    assert whole[0].shape.num_tokens == 10


def test_paths_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        StepLogExecutor(ContextExecutor(), tmp_path / "none" / "steps", 4)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_step_log([tmp_path / "none"])
    (tmp_path / "bad").write_text("x\n")
    with pytest.raises(ConfigError, match="not a step log"):
        read_step_log([tmp_path / "bad"])
