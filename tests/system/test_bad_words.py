"""Banned sequences in the production engine: greedy text without one of its own pairs of tokens."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from pelton.core.request import Submission
from pelton.core.sampling_params import SamplingParams
from pelton.engine.engine import Engine
from tests.system.test_pooling import make_engine, prompt
from tests.worker.tiny_models import save_tiny

pytestmark = pytest.mark.torch


def generate(engine: Engine, banned: tuple[tuple[int, ...], ...]) -> list[int]:
    """Greedy tokens, beside a request that bans nothing."""
    for name, sequences in (("own", banned), ("other", ())):
        sampling = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True, banned_sequences=sequences)
        engine.submit(Submission(request_id=name, prompt_token_ids=prompt(3), sampling=sampling))
    token_ids: list[int] = []
    while engine.has_work:
        engine.dispatch()
        engine.collect()
        update = engine.take_update()
        for output in update.outputs if update is not None else ():
            assert output.error is None
            token_ids += output.token_ids if output.request_id == "own" else ()
    return token_ids


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_banned_pair_is_never_completed(tmp_path: Path, backend: str) -> None:
    save_tiny("qwen2", tmp_path)
    engine = make_engine(tmp_path, kernel_backend=backend)
    free = generate(engine, ())
    pair = (free[3], free[4])
    banned = generate(engine, (pair,))
    assert banned[:4] == free[:4]  # the first of the two may be written
    assert banned[4] != free[4]
    assert pair not in set(pairwise(banned))
    assert len(banned) == 30
    single = generate(engine, ((free[0],),))
    assert free[0] not in single
    engine.executor.close()
