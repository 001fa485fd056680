"""`StepFacts`: what attention must know of a step, on the device and on the host.

Legend: T tokens, R requests, B blocks in a table.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch


@dataclass(frozen=True, slots=True)
class StepFacts:
    """Requests lie one after another. In a captured step the tensors stay where they are while their values change,
    and the numbers are bounds: a kernel's grid may depend on these only, never on a tensor's values. Requests
    that pad a captured step have a length of 1 and the null block.
    """

    query_start_loc: torch.Tensor  # int32 [R + 1]
    seq_lens: torch.Tensor  # int32 [R]
    num_tokens: int  # T
    max_query_len: int  # 1: every request has one token, token r is request r's
    max_seq_len: int

    @classmethod
    def of(
        cls, query_start_loc: npt.NDArray[np.int64], seq_lens: npt.NDArray[np.int64], device: torch.device
    ) -> StepFacts:
        """Copied to the device now; a program's steps have theirs in its one copy."""
        return cls(
            torch.tensor(query_start_loc, dtype=torch.int32, device=device),
            torch.tensor(seq_lens, dtype=torch.int32, device=device),
            int(query_start_loc[-1]),
            int(np.diff(query_start_loc).max()),
            int(np.max(seq_lens)),
        )
