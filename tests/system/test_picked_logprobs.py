"""`logprob_token_ids` in the production engine: those tokens' logprobs, whatever is likely and whatever is sampled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pelton.core.output import TokenLogprobs
from pelton.core.request import Submission
from pelton.core.sampling_params import MAX_LOGPROBS, SamplingParams
from pelton.engine.engine import Engine
from tests.system.test_pooling import make_engine, prompt
from tests.worker.tiny_models import save_tiny

pytestmark = pytest.mark.torch


def generate(engine: Engine, **options: Any) -> list[TokenLogprobs]:
    """Beside a request that names no tokens."""
    options = {"temperature": 0.0, "max_tokens": 4, "ignore_eos": True, "logprobs": 0} | options
    plain = options | {"logprob_token_ids": ()}
    for name, sampling in (("own", SamplingParams(**options)), ("other", SamplingParams(**plain))):
        engine.submit(Submission(request_id=name, prompt_token_ids=prompt(3), sampling=sampling))
    found: list[TokenLogprobs] = []
    while engine.has_work:
        engine.dispatch()
        engine.collect()
        update = engine.take_update()
        for output in update.outputs if update is not None else ():
            assert output.error is None
            found += output.logprobs or () if output.request_id == "own" else ()
            if output.request_id == "other" and options["logprobs"] == 0:
                assert all(not entry.top for entry in output.logprobs or ())
    return found


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 5, "logit_bias": {7: 9.0}, "top_k": 3}])
def test_the_named_tokens_are_reported(tmp_path: Path, backend: str, options: dict[str, Any]) -> None:
    save_tiny("qwen2", tmp_path)
    engine = make_engine(tmp_path, kernel_backend=backend)
    likely = generate(engine, **options, logprobs=MAX_LOGPROBS)
    for position, entry in enumerate(likely):
        named = tuple(token_id for token_id, _ in entry.top[::3])
        found = generate(engine, **options, logprob_token_ids=named)[position]
        assert (found.token_id, found.logprob, found.rank) == (entry.token_id, entry.logprob, entry.rank)
        expected = {**dict(entry.top[::3]), entry.token_id: entry.logprob}
        assert dict(found.top) == pytest.approx(expected, abs=1e-9)
        assert [value for _, value in found.top] == sorted((value for _, value in found.top), reverse=True)
    engine.executor.close()
