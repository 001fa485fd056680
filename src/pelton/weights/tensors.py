"""Named tensors as files hold them: packed bytes with a format, decoded only on request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pelton.core.model_spec import ModelSpec

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class WeightTensor:
    """A tensor in the file's own layout.

    `name` and `shape` are Hugging Face's (row-major, `[out, in]` for a projection) whatever the file
    was; `data` is uint8 `[num_bytes]`, usually a read-only view of a memory map.
    """

    name: str
    shape: tuple[int, ...]
    format: str  # F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K .. Q6_K, IQ4_NL, IQ4_XS
    data: npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """What the model's authors recommend; None where the files say nothing."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    eos_token_ids: tuple[int, ...] = ()


class ModelFiles(Protocol):
    """An opened model, whatever its container. Opening reads headers only."""

    path: Path
    spec: ModelSpec
    generation_defaults: GenerationDefaults
    chat_template: str | None
    tokenizer_metadata: Mapping[str, Any] | None  # of a file that holds its tokenizer

    def tensor_names(self) -> list[str]: ...

    def tensor(self, name: str) -> WeightTensor:
        """Raises `ModelFileError` where the tensor is missing or its bytes are out of bounds."""
        ...

    def drop_pages(self) -> None:
        """Take the pages read so far out of this process's memory; the system still has them in its cache."""
        ...
