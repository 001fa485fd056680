"""The native module, built from native/module.cpp. Tensors are passed as addresses."""

from collections.abc import Sequence

FORMATS: list[str]

def packed_num_bytes(format: str, num_outputs: int, num_inputs: int) -> int: ...

class WeightMemory:
    def __init__(self, num_bytes: int) -> None: ...
    @staticmethod
    def map(file: int, num_bytes: int) -> WeightMemory: ...
    @property
    def address(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    def replace_with(self, file: int, num_bytes: int) -> None: ...
    def prefetch(self) -> None: ...

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
    def add_packed(self, format: str, num_outputs: int, memory: WeightMemory, offset: int) -> None: ...
    @property
    def num_inputs(self) -> int: ...
    @property
    def num_outputs(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...

class AttentionPlan:
    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        sliding_window: int,
        bf16: bool,
        requests: Sequence[tuple[int, int, int, int]],
        block_tables: int,
        num_rows: int,
        num_columns: int,
    ) -> None: ...

class Runtime:
    def __init__(
        self, isa: str | None, num_threads: int, cpus: Sequence[int], activation_dtype: str = "auto"
    ) -> None: ...
    @property
    def isa(self) -> str: ...
    @property
    def num_threads(self) -> int: ...
    def linear(self, weight: LinearWeight, x: int, num_rows: int, bias: int, out: int) -> None: ...
    def rms_norm(self, x: int, residual: int, weight: int, num_rows: int, size: int, eps: float, out: int) -> None: ...
    def gated(self, gelu: bool, gate_up: int, num_rows: int, size: int, out: int) -> None: ...
    def rotate_and_store(
        self,
        heads: tuple[int, int, int, bool],
        tokens: tuple[int, int, int, int, int],
        rows: tuple[int, int, int, int, int, int],
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
    def argmax(self, logits: int, num_rows: int, size: int, out: int) -> None: ...
