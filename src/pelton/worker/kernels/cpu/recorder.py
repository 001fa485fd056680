"""Records a forward pass as a `pelton_cpu.Program`: the ops of `ops.Ops` on values instead of arrays."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from pelton.core.errors import UnsupportedModelError
from pelton.weights.tensors import WeightTensor
from pelton.worker.kernels.cpu import pelton_cpu
from pelton.worker.kernels.cpu.arrays import Cache, Floats, address, embedding_table


@dataclass(frozen=True, eq=False)
class Buffer:
    """A matrix with a row for each row of the run."""

    width: int


@dataclass(frozen=True, slots=True)
class Value:
    """Columns of a buffer; `shape` is that of a row: (columns,) or (heads, head size)."""

    buffer: Buffer
    shape: tuple[int, ...]
    column: int = 0


@dataclass(frozen=True, slots=True)
class GroupInput:
    """What a step brings for a KV group: its rotary angles, slot mapping and attention plan, all in one."""

    group_id: int


NO_MIXTURES = "native kernels have no mixtures of experts: use --kernel-backend reference, or triton on a GPU"

Op = tuple[str, tuple[Any, ...]]


class Recorder:
    """Implements `ops.Ops` on `Value`. Nothing is computed; what is not a value must outlive the program."""

    def __init__(self) -> None:
        self._ops: list[Op] = []

    def build(self, program: pelton_cpu.Program, result: Value) -> list[str]:
        """Add the ops to `program`, whose first slot becomes `result`; what each is called, products with widths.

        Buffers whose lives do not overlap share a slot where they are equally wide.
        """
        ops = _with_fused_mlps(self._ops)
        last_use = {buffer: i for i, (_, args) in enumerate(ops) for buffer in _buffers(args)}
        slots = {result.buffer: program.add_slot(result.buffer.width)}
        free: dict[int, list[int]] = defaultdict(list)
        for i, (name, args) in enumerate(ops):
            for buffer in _buffers(args):
                if buffer not in slots:
                    vacant = free[buffer.width]
                    slots[buffer] = vacant.pop() if vacant else program.add_slot(buffer.width)
            places = [(slots[arg.buffer], arg.column) if isinstance(arg, Value) else arg for arg in args]
            getattr(program, name)(*places)
            for buffer in _buffers(args):
                if last_use[buffer] == i and buffer is not result.buffer:
                    free[buffer.width].append(slots[buffer])
        return [_label(name, args) for name, args in ops]

    def select_rows(self, width: int) -> Value:
        """The rows that a head is run on."""
        out = _new(width)
        self._add("select_rows", width, out)
        return out

    def only_product(self) -> tuple[pelton_cpu.LinearWeight, int] | None:
        """Its weight and the bias's address, where nothing else is done to selected rows but for adapters."""
        if [name for name, _ in self._ops] != ["select_rows", "linear", "adapt"]:
            return None
        _, (weight, _, bias, _) = self._ops[1]
        return weight, bias

    def linear(self, x: Value, weight: pelton_cpu.LinearWeight, bias: Floats | None = None) -> Value:
        out = _new(weight.num_outputs)
        self._add("linear", weight, x, 0 if bias is None else address(bias), out)
        return out

    def adapt(self, y: Value, x: Value, site: int) -> Value:
        self._add("adapt", site, x, math.prod(x.shape), y, math.prod(y.shape))
        return y

    def embedding(self, token_ids: None, table: WeightTensor, scale: float = 1.0) -> Value:
        del token_ids  # a body has one input of tokens
        out = _new(table.shape[1])
        self._add("embedding", embedding_table(table, scale), out)
        return out

    def rms_norm(self, x: Value, weight: Floats, eps: float) -> Value:
        out = Value(Buffer(math.prod(x.shape)), x.shape)
        num_heads = x.shape[0] if len(x.shape) == 2 else 1
        self._add("rms_norm", x, num_heads, address(weight), x.shape[-1], eps, out)
        return out

    def add_rms_norm(self, x: Value, residual: Value, weight: Floats, eps: float) -> tuple[Value, Value]:
        (size,) = x.shape
        out = _new(size)
        self._add("add_rms_norm", x, residual, address(weight), size, eps, out)
        return out, residual

    def split_heads(self, x: Value, num_heads: int, num_kv_heads: int) -> tuple[Value, Value, Value]:
        head_dim = x.shape[0] // (num_heads + 2 * num_kv_heads)
        first_value = num_heads + num_kv_heads
        return (
            Value(x.buffer, (num_heads, head_dim)),
            Value(x.buffer, (num_kv_heads, head_dim), num_heads * head_dim),
            Value(x.buffer, (num_kv_heads, head_dim), first_value * head_dim),
        )

    def rotate_and_store(
        self,
        query: Value,
        key: Value,
        value: Value,
        cos: GroupInput,
        sin: GroupInput,
        key_cache: Cache,
        value_cache: Cache,
        slot_mapping: GroupInput,
    ) -> Value:
        del cos, sin  # they come with the slots
        caches = address(key_cache), address(value_cache)
        self._add("rotate_and_store", slot_mapping.group_id, query, key, value, *caches)
        return query

    def paged_attention(
        self,
        query: Value,
        key_cache: Cache,
        value_cache: Cache,
        plan: GroupInput,
        scale: float,
        softcap: float | None = None,
    ) -> Value:
        out = _new(math.prod(query.shape))
        caches = address(key_cache), address(value_cache)
        self._add("attend", plan.group_id, query, *caches, scale, softcap or 0.0, out)
        return out

    def silu_mul(self, gate_up: Value) -> Value:
        return self._gated(gate_up, gelu=False)

    def gelu_tanh_mul(self, gate_up: Value) -> Value:
        return self._gated(gate_up, gelu=True)

    def _gated(self, gate_up: Value, *, gelu: bool) -> Value:
        size = gate_up.shape[0] // 2
        out = _new(size)
        self._add("gated", gelu, gate_up, size, out)
        return out

    def moe(self, x: Value, logits: Value, experts: Any, num_chosen: int, normalizes: bool) -> NoReturn:
        del x, logits, experts, num_chosen, normalizes
        raise UnsupportedModelError(NO_MIXTURES)

    def softcap(self, x: Value, cap: float) -> Value:
        self._add("softcap", x, x.shape[0], cap)
        return x

    def _add(self, name: str, *args: Any) -> None:
        self._ops.append((name, args))


def _new(width: int) -> Value:
    return Value(Buffer(width), (width,))


def _label(name: str, args: tuple[Any, ...]) -> str:
    """A product also by its widths."""
    if name not in ("linear", "gated_mlp"):
        return name
    widths = [arg.num_inputs for arg in args if hasattr(arg, "num_inputs")]
    return " ".join([name, *(f"{width} ->" for width in widths), str(args[-1].buffer.width)])


def _buffers(args: tuple[Any, ...]) -> set[Buffer]:
    return {arg.buffer for arg in args if isinstance(arg, Value)}


def _with_fused_mlps(ops: Sequence[Op]) -> list[Op]:
    """`ops` with every gated feed-forward layer as one op: its wide results need not go through memory."""
    num_uses = Counter(buffer for _, args in ops for buffer in _buffers(args))
    fused: list[Op] = []
    i = 0
    while i < len(ops):
        mlp = _try_fuse_mlp(ops[i : i + 5], num_uses)
        fused.append(mlp or ops[i])
        i += 5 if mlp else 1
    return fused


def _try_fuse_mlp(ops: Sequence[Op], num_uses: Mapping[Buffer, int]) -> Op | None:
    if [name for name, _ in ops] != ["linear", "adapt", "gated", "linear", "adapt"]:
        return None
    (wide_weight, x, wide_bias, wide), up_adapt, (gelu, gate_up, _, gated), down, down_adapt = [a for _, a in ops]
    weight, narrow, bias, out = down
    is_chain = up_adapt[3] is gate_up is wide and narrow is gated and down_adapt[3] is out
    if not is_chain or num_uses[wide.buffer] != 3 or num_uses[gated.buffer] != 3:
        return None
    return ("gated_mlp", (gelu, wide_weight, wide_bias, weight, bias, (up_adapt[0], down_adapt[0]), x, out))
