"""What a kernel backend offers to choose tokens: `Sampler`, and what it answers.

Law 3: a row's answer is a function of that row of logits, its `SamplingRow` and its position alone, bit
for bit. All samplers choose the same tokens from the same logits: they draw from weights in integers
(`weights.py`), whose sums do not depend on an order.

Legend: S rows (requests that sample), V vocabulary, W = ceil(V / 32).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pelton.core.output import TokenLogprobs
from pelton.core.sampling_params import SamplingParams

Logits = npt.NDArray[np.float32]  # [S, V]
TokenMask = npt.NDArray[np.uint32]  # [W]: bit i % 32 of word i // 32 says whether token i is allowed

ALL_BANNED = "no token is left to sample: the request's settings, or its grammar with them, ban all of them"
OVERFLOW = "penalties or logit_bias made the logits overflow"


def not_finite(greatest: float) -> str:
    return f"the model's logits are not finite (the greatest is {greatest})"


@dataclass(frozen=True, slots=True)
class Samples:
    """One answer per row: a token id, or -1 and a text in `problems`. Both dicts are by row."""

    token_ids: list[int]
    problems: dict[int, str]
    logprobs: dict[int, TokenLogprobs]  # of the rows whose `SamplingParams` ask for them


class SamplingRow(Protocol):
    """What the sampling of one request remembers between steps."""

    def add_prompt(self, token_ids: Sequence[int]) -> None: ...

    def add_output(self, token_ids: Sequence[int]) -> None: ...


class LateSamples(Protocol):
    """Tokens that are being chosen on a device; what was asked of their rows needs nothing of the host."""

    tokens: Any  # the device's array [S], for `Program.forward`

    def wait(self) -> None:
        """Until they are known. Callable from any thread."""
        ...

    def result(self) -> Samples: ...


class Sampler(Protocol):
    def make_row(self, sampling: SamplingParams, seed: int) -> SamplingRow: ...

    def sample(
        self,
        logits: Any,
        rows: Sequence[Any],
        positions: Sequence[int],
        masks: Sequence[TokenMask | None] | None = None,
    ) -> Samples:
        """The next token of each row of `logits`, which may be edited in place; float32 [S, V] as a program gives them.

        `rows` are this sampler's own; `positions` are the numbers of output tokens so far, which with the
        seed decide the draw. `masks` narrow a row to what a grammar allows in this step; None: anything.
        """
        ...

    def try_sample_late(self, logits: Any, rows: Sequence[Any], positions: Sequence[int]) -> LateSamples | None:
        """As `sample` without masks, but does not wait for the tokens; None where these rows, or this sampler, must."""
        ...

    def token_logprobs(self, logits: Any, token_ids: Sequence[int], num_top: int) -> list[TokenLogprobs] | None:
        """Logprob and rank of `token_ids` [S] and the `num_top` most likely of each row, or fewer where
        others are impossible; ties go to the lower id.

        None where a row holds NaN, or its greatest logit is infinite.
        """
        ...
