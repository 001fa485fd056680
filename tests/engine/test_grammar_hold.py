"""A grammar that is still compiled holds up its own request, and nobody else's."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from pelton.core.errors import InvalidRequestError
from pelton.core.grammar import Grammar, GrammarKind
from pelton.core.output import RequestOutput
from pelton.core.request import FinishReason, Submission
from pelton.core.sampling_params import SamplingParams
from pelton.engine.engine import Engine
from tests.make import make_engine

GRAMMAR = Grammar(kind=GrammarKind.REGEX, source="a*")


def make() -> tuple[Engine, Future[None], list[str]]:
    engine = make_engine()
    ready: Future[None] = Future()
    woken: list[str] = []
    engine.grammars.prepare = lambda _: ready
    engine.wake_with(lambda: woken.append("woken"))
    for name, grammar in (("held", GRAMMAR), ("free", None)):
        sampling = SamplingParams(max_tokens=2, temperature=0, grammar=grammar, ignore_eos=True)
        engine.submit(Submission(request_id=name, prompt_token_ids=[1, 2, 3], sampling=sampling))
    return engine, ready, woken


def run(engine: Engine) -> list[RequestOutput]:
    outputs: list[RequestOutput] = []
    for _ in range(8):
        engine.dispatch()
        while engine.num_in_flight:
            engine.collect()
        update = engine.take_update()
        outputs += update.outputs if update is not None else ()
    return outputs


def test_others_run_meanwhile() -> None:
    engine, ready, woken = make()
    assert {output.request_id for output in run(engine)} == {"free"}
    assert engine.num_waiting == 1
    assert engine.stats().num_deferred == 1
    ready.set_result(None)
    assert woken == ["woken"]
    assert [output.request_id for output in run(engine)][-1] == "held"
    assert not engine.has_work


@pytest.mark.parametrize("error", [InvalidRequestError("no such grammar", param="g"), RuntimeError("broken")])
def test_what_is_wrong_with_it_comes_out_typed(error: Exception) -> None:
    engine, ready, _ = make()
    ready.set_exception(error)
    (output,) = [output for output in run(engine) if output.request_id == "held"]
    assert output.finish_reason is FinishReason.ERROR
    assert output.error is not None
    assert str(error) in output.error.message
    assert not engine.has_work


def test_a_held_request_can_be_cancelled() -> None:
    engine, ready, _ = make()
    engine.cancel("held")
    ready.set_result(None)
    assert [output.request_id for output in run(engine) if output.token_ids] != []
    assert not engine.has_work
