"""The native module, built from native/module.cpp. Arrays are passed as addresses."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

FORMATS: list[str]
BLOCK_FORMATS: list[str]  # whose rows are decoded

def dram_buffer_bytes() -> int: ...
def l2_cache_bytes() -> int: ...
def l3_cache_bytes() -> int: ...
def measure_ceilings(num_threads: int, dram_bytes: int) -> list[tuple[str, float, float]]: ...
def packed_num_bytes(format: str, num_outputs: int, num_inputs: int) -> int: ...
def take_pages(data: int, num_bytes: int) -> None: ...

class WeightMemory:
    def __init__(self, num_bytes: int) -> None: ...
    @staticmethod
    def map(file: int, num_bytes: int) -> WeightMemory: ...
    @property
    def address(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def num_mapped_bytes(self) -> int: ...
    def copy_file(self) -> None: ...

class LinearWeight:
    def __init__(self, num_inputs: int) -> None: ...
    def add(
        self,
        runtime: Runtime,
        format: str,
        num_outputs: int,
        data: int,
        num_bytes: int,
        memory: WeightMemory | None = None,
        offset: int = 0,
    ) -> None: ...
    # `formats`: of the data, and the one by channel that it is rounded to.
    def add_rounded(
        self,
        runtime: Runtime,
        formats: tuple[str, str],
        num_outputs: int,
        data: int,
        num_bytes: int,
        memory: WeightMemory | None = None,
        offset: int = 0,
    ) -> None: ...
    def add_packed(self, format: str, num_outputs: int, memory: WeightMemory, offset: int) -> None: ...
    @property
    def num_inputs(self) -> int: ...
    @property
    def num_outputs(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...

class EmbeddingTable:
    def __init__(self, format: str, data: int, num_bytes: int, num_rows: int, width: int, scale: float) -> None: ...
    @property
    def width(self) -> int: ...

class AttentionPlan:
    def __init__(
        self,
        runtime: Runtime,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        sliding_window: int,
        bf16: bool,
        query_start_loc: int,
        seq_lens: int,
        num_requests: int,
        block_tables: int,
        num_columns: int,
    ) -> None: ...
    @property
    def num_positions_read(self) -> int: ...

NO_COLUMN: int

class Runtime:
    def __init__(
        self, isa: str | None, num_threads: int, cpus: Sequence[int], activation_dtype: str = "auto"
    ) -> None: ...
    @property
    def isa(self) -> str: ...
    @property
    def num_threads(self) -> int: ...
    def linear(self, weight: LinearWeight, x: int, num_rows: int, bias: int, out: int) -> None: ...
    # NO_COLUMN for a row that is not finite.
    def greatest_columns(self, weight: LinearWeight, x: int, num_rows: int, bias: int) -> list[int]: ...
    def embedding(self, table: EmbeddingTable, token_ids: int, num_tokens: int, out: int) -> None: ...
    def softcap(self, x: int, num_rows: int, size: int, cap: float) -> None: ...
    def rms_norm(self, x: int, residual: int, weight: int, num_rows: int, size: int, eps: float, out: int) -> None: ...
    def gated(self, gelu: bool, gate_up: int, num_rows: int, size: int, out: int) -> None: ...
    def rotate_and_store(
        self,
        heads: tuple[int, int, int, int, bool],
        tokens: tuple[int, int, int, int, int],
        rows: tuple[int, ...],
        key_cache: int,
        value_cache: int,
        num_slots: int,
    ) -> None: ...
    def attend(
        self,
        plan: AttentionPlan,
        num_tokens: int,
        num_blocks: int,
        scale: float,
        softcap: float,
        query: int,
        ld_query: int,
        keys: int,
        values: int,
        out: int,
    ) -> None: ...

LORA_ALIGN: int
LORA_PANEL: int

class LoraAdapter:
    def __init__(self, num_sites: int) -> None: ...
    def set_site(
        self,
        index: int,
        num_inputs: int,
        num_ranks: int,
        shrink: tuple[int, bool],
        parts: Sequence[tuple[int, int, int, int, float, int, bool]],
    ) -> None: ...

def add_lora(
    runtime: Runtime,
    adapters: Sequence[tuple[LoraAdapter, npt.NDArray[np.int64]]],
    site: int,
    x: npt.NDArray[np.float32],
    out: npt.NDArray[np.float32],
) -> None: ...

class Program:
    def __init__(
        self, runtime: Runtime, groups: Sequence[tuple[int, int, int, int, int, bool]], num_blocks: int
    ) -> None: ...
    def add_slot(self, width: int) -> int: ...
    @property
    def slot_widths(self) -> list[int]: ...
    def time_ops(self) -> None: ...
    def take_times(self) -> list[float]: ...
    # And one method per op, called by name from program.py.
    def __getattr__(self, op: str) -> Any: ...
    def run_step(
        self,
        token_ids: npt.NDArray[np.int64],
        query_start_loc: npt.NDArray[np.int64],
        seq_lens: npt.NDArray[np.int64],
        groups: Sequence[tuple[npt.NDArray[Any], ...]],
        result: npt.NDArray[np.float32],
        adapters: Sequence[tuple[LoraAdapter, npt.NDArray[np.int64]]] = ...,
    ) -> None: ...
    def run_rows(
        self,
        hidden: npt.NDArray[np.float32],
        rows: npt.NDArray[np.int64],
        result: npt.NDArray[np.float32],
        adapters: Sequence[tuple[LoraAdapter, npt.NDArray[np.int64]]] = ...,
    ) -> None: ...

class SamplingRow:
    def __init__(
        self,
        vocab_size: int,
        *,
        temperature: float,
        filters: tuple[int, float, float],
        seed: int,
        penalties: tuple[float, float, float],
        bias: Sequence[tuple[int, float]],
        allowed: Sequence[int] | None,
        banned: Sequence[int],
        stops: tuple[int, Sequence[int]],
        num_logprobs: int,
    ) -> None: ...
    def add_prompt(self, token_ids: Sequence[int]) -> None: ...
    def add_output(self, token_ids: Sequence[int]) -> None: ...

_Logprobs = tuple[int, float, int, list[tuple[int, float]]]

class Sampler:
    def __init__(self, runtime: Runtime, vocab_size: int) -> None: ...
    def sample(
        self, logits: int, rows: Sequence[SamplingRow], positions: Sequence[int], masks: Sequence[int]
    ) -> tuple[list[int], list[tuple[int, _Logprobs]]]: ...
    def token_logprobs(self, logits: int, token_ids: Sequence[int], num_top: int) -> list[_Logprobs] | None: ...
