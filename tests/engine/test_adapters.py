"""LoRA adapters in the engine: whose blocks are whose, and how long an adapter lives."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest

from pelton.core.errors import ModelFileError
from pelton.core.lora import LoraAdapter
from pelton.core.output import RequestOutput
from pelton.engine.adapters import AdapterTable
from pelton.engine.engine import Engine
from pelton.engine.wire import AdapterLoaded, AdapterUnloaded, LoadAdapter, UnloadAdapter, decode_command, encode
from tests.make import generate, make_engine, make_submission, run, step

PROMPT = range(100, 180)


class Store:
    """Implements `core.protocols.AdapterStore`; the test says when a load ends."""

    def __init__(self, *lora_ids: str) -> None:
        self.loaded = set(lora_ids)
        self.loads: list[Future[LoraAdapter]] = []

    def load(self, path: str) -> Future[LoraAdapter]:
        del path
        self.loads.append(Future())
        return self.loads[-1]

    def finish(self, lora_id: str) -> None:
        self.loaded.add(lora_id)
        self.loads.pop(0).set_result(adapter(lora_id))

    def remove(self, lora_id: str) -> None:
        self.loaded.remove(lora_id)


def adapter(lora_id: str) -> LoraAdapter:
    return LoraAdapter(lora_id, f"/{lora_id}", 8, 1000)


def engine_with(*lora_ids: str, **options: Any) -> tuple[Engine, Store]:
    engine, store = make_engine(**options), Store(*lora_ids)
    engine.adapters = AdapterTable(store, map(adapter, lora_ids))
    return engine, store


def replies(engine: Engine) -> list[Any]:
    update = engine.take_update()
    return list(update.replies) if update is not None else []


def test_equal_prompts_share_blocks_within_an_adapter_only() -> None:
    engine, _ = engine_with("x", "y", num_blocks=200)

    def cached(lora_id: str, salt: str = "") -> int:
        engine.submit(make_submission(PROMPT, lora_id=lora_id, cache_salt=salt))
        return max(output.usage.num_cached_tokens for output in run(engine) if output.usage is not None)

    assert [cached("x"), cached("y"), cached("")] == [0, 0, 0]
    found = [cached("x"), cached("y"), cached("")]
    assert min(found) > 0
    assert cached("x", "salt") == 0


def test_tokens_are_those_of_each_alone_through_preemptions() -> None:
    """The executor of `make_engine` answers from what it finds in the block tables."""
    submissions = [(range(index, index + 30), ("", "x", "y")[index % 3]) for index in range(9)]
    alone = []
    for prompt, lora_id in submissions:
        engine, _ = engine_with("x", "y", num_blocks=64)
        alone += generate(engine, make_submission(prompt, lora_id=lora_id, max_tokens=40)).values()
    engine, _ = engine_with("x", "y", num_blocks=28)
    together = generate(engine, *(make_submission(p, lora_id=lora_id, max_tokens=40) for p, lora_id in submissions))
    assert engine.scheduler.counters.num_preemptions > 0
    assert list(together.values()) == alone


def test_an_unknown_adapter_is_not_found() -> None:
    engine, _ = engine_with("x")
    engine.submit(make_submission(PROMPT, lora_id="z"))
    (output,) = run(engine)
    assert isinstance(output, RequestOutput)
    assert output.error is not None
    assert output.error.code == "model_not_found"
    assert not engine.has_work


@pytest.mark.parametrize("enable_overlap", [True, False])
def test_an_unloaded_adapter_lives_as_long_as_its_requests(enable_overlap: bool) -> None:
    engine, store = engine_with("x", enable_overlap=enable_overlap)
    for n in (1, 2):
        engine.submit(make_submission(PROMPT, lora_id="x", max_tokens=6, n=n))
    step(engine)
    engine.ask(UnloadAdapter(7, "x"))
    assert replies(engine) == [AdapterUnloaded(7)]
    engine.submit(make_submission(PROMPT, lora_id="x"))
    codes, num_tokens = set(), 0
    while engine.has_work:
        assert store.loaded == {"x"}
        for output in step(engine):
            num_tokens += len(output.token_ids)
            codes.add(output.error.code if output.error is not None else None)
    engine.take_update()
    assert codes == {None, "model_not_found"}
    assert num_tokens >= 17
    assert store.loaded == set()


def test_a_cancelled_request_lets_its_adapter_go_after_the_step_in_flight() -> None:
    engine, store = engine_with("x")
    submission = make_submission(PROMPT, lora_id="x", max_tokens=50)
    engine.submit(submission)
    step(engine)
    engine.dispatch()
    assert engine.num_in_flight
    engine.ask(UnloadAdapter(1, "x"))
    engine.cancel(submission.request_id)
    engine.take_update()
    assert store.loaded == {"x"}
    while engine.num_in_flight:
        engine.collect()
    engine.take_update()
    assert store.loaded == set()


def test_loads_answer_when_they_have_ended() -> None:
    engine, store = engine_with("x")
    woken = []
    engine.wake_with(lambda: woken.append(1))
    engine.ask(LoadAdapter(1, "/a"))
    engine.ask(LoadAdapter(2, "/b"))
    assert replies(engine) == []
    store.finish("a")
    assert woken
    assert replies(engine) == [AdapterLoaded(1, adapter("a"))]
    store.loads.pop().set_exception(ModelFileError("/b", "damaged"))
    (reply,) = replies(engine)
    assert reply.error.code == "invalid_model_file"
    assert "damaged" in reply.error.message
    assert len(generate(engine, make_submission(PROMPT, lora_id="a"))) == 1


def test_a_load_of_what_is_leaving_keeps_it() -> None:
    engine, store = engine_with("x")
    engine.ask(LoadAdapter(1, "/x"))
    engine.ask(UnloadAdapter(2, "x"))
    replies(engine)
    assert store.loaded == {"x"}  # the load may have found it there
    store.finish("x")
    replies(engine)
    assert store.loaded == {"x"}
    assert len(generate(engine, make_submission(PROMPT, lora_id="x"))) == 1


def test_commands_cross_the_wire() -> None:
    for command in (LoadAdapter(3, "/a"), UnloadAdapter(4, "x")):
        assert decode_command(encode(command)) == command
