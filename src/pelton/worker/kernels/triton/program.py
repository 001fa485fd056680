"""`TritonProgram`: a model over its cache. Decodes run as captured graphs, padded to a few sizes; the rest op by op.

Legend as in `step_inputs.py`; H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from pelton.worker.forward_batch import Adapters, ForwardBatch, adapters_among
from pelton.worker.kernels.ops import AttentionContext, AttentionShape, Forward, LayerCache, Ops
from pelton.worker.kernels.triton.attention import AttentionPlan, plan_on_device
from pelton.worker.kernels.triton.attention_config import AttentionConfig, choose_config
from pelton.worker.kernels.triton.attention_plan import HostPlan, PlanSizes, make_plan
from pelton.worker.kernels.triton.device import memory_errors
from pelton.worker.kernels.triton.embedding import put_late_tokens
from pelton.worker.kernels.triton.flashinfer_attention import FlashInferAttention, FlashInferPlan
from pelton.worker.kernels.triton.graphs import make_graphs
from pelton.worker.kernels.triton.lora import LoraBatch
from pelton.worker.kernels.triton.rotary_tables import RotaryTables
from pelton.worker.kernels.triton.step_inputs import Ints, StepInputs, StepTensors, Words

if TYPE_CHECKING:
    from pelton.worker.kernels.triton.backend import TritonKernels

_MAX_CAPTURED = 512  # tokens
_LEAST_TABLES = 64  # blocks, of all requests


class TritonProgram:
    """Implements `ops.Program`. Only `hidden` waits for the device."""

    def __init__(
        self,
        kernels: TritonKernels,
        model: Forward,
        shapes: Sequence[AttentionShape],
        caches: Sequence[LayerCache],
        rivals: Sequence[FlashInferAttention | None],
    ) -> None:
        """`rivals`: of each KV group, for steps that are not captured."""
        self._kernels = kernels
        self._model = model
        self._shapes = shapes
        self._configs = [choose_config(shape, batch_invariant=kernels.batch_invariant) for shape in shapes]
        self._caches = caches
        self._rivals = rivals
        self._inputs = StepInputs(kernels.device)
        self._graphs = make_graphs(kernels.device)
        self._rotary = RotaryTables(kernels.device)
        self._generations = (0, 0)
        self._hidden = torch.empty(0)
        self._logits_rows: tuple[Ints, torch.Tensor] = (np.empty(0, np.int64), torch.empty(0))

    @torch.inference_mode()
    def forward(
        self, batch: ForwardBatch, late_tokens: torch.Tensor | None = None, late_rows: Ints | None = None
    ) -> None:
        """`late_rows` [T]: which tokens are rows of `late_tokens`, on the device, and not what `batch` says; -1: no."""
        if self._kernels.device.type == "cuda":
            torch.cuda.set_device(self._kernels.device)  # of this thread
        with memory_errors(self._give_up_all):
            self._forward(batch, late_tokens, late_rows)

    def _give_up_kept(self) -> None:
        self._graphs.clear()
        self._kernels.give_up_kept()

    def _give_up_all(self) -> None:
        """The hidden states of the step before, too: there will be no other logits of them."""
        self._give_up_kept()
        self._hidden = torch.empty(0)

    def _forward(self, batch: ForwardBatch, late_tokens: torch.Tensor | None, late_rows: Ints | None) -> None:
        planned = _Planned(batch, self._shapes, self._configs)
        tensors = self._inputs.load(batch, planned.num_tokens, planned.words, late_rows)
        self._rotary.reserve([group.rotation for group in batch.groups])
        generations = (self._inputs.generation, self._rotary.generation)
        if generations != self._generations:
            self._graphs.clear()
            self._generations = generations
        if late_tokens is not None:
            put_late_tokens(tensors.token_ids, tensors.late_rows, late_tokens)
        ops = self._ops(batch.adapters)
        plans = planned.on_device(tensors.plans)
        if planned.is_captured:
            self._hidden = self._graphs.run(planned.key, lambda: self._compute(ops, batch, tensors, plans))
        else:
            self._hidden = self._compute(ops, batch, tensors, self._by_rivals(plans, batch))
        self._logits_rows = (batch.logits_indices, tensors.logits_rows)

    def _by_rivals(self, plans: Sequence[AttentionPlan], batch: ForwardBatch) -> list[AttentionPlan | FlashInferPlan]:
        starts, lens = batch.query_start_loc, batch.seq_lens
        return [
            plan if rival is None else rival.plan(plan, starts, lens, group.block_tables)
            for plan, rival, group in zip(plans, self._rivals, batch.groups, strict=True)
        ]

    def _compute(
        self,
        ops: Ops,
        batch: ForwardBatch,
        tensors: StepTensors,
        plans: Sequence[AttentionPlan | FlashInferPlan],
    ) -> torch.Tensor:
        """Looks at nothing of `batch` but which rotary tables its groups have."""
        angles = self._rotary.lookup([group.rotation for group in batch.groups], tensors.positions)
        contexts = [
            AttentionContext(
                *angles[cache.group_id],
                tensors.slot_mappings[cache.group_id],
                plans[cache.group_id],
                cache.keys,
                cache.values,
            )
            for cache in self._caches
        ]
        hidden: torch.Tensor = self._model.forward(ops, tensors.token_ids, contexts)
        return hidden

    @torch.inference_mode()
    def logits(self, rows: Ints, adapters: Adapters = ()) -> torch.Tensor:
        """On the device."""
        with memory_errors(self._give_up_kept):
            ops = self._ops(adapters_among(adapters, rows))
            logits: torch.Tensor = self._model.compute_logits(ops, self._select(rows)).float()
            return logits

    def _ops(self, adapters: Adapters) -> Ops:
        return _LoraOps(self._kernels, adapters) if adapters else self._kernels

    def _select(self, rows: Ints) -> torch.Tensor:
        if np.array_equal(rows, np.arange(len(rows))):
            return self._hidden[: len(rows)]
        known, on_device = self._logits_rows
        if np.array_equal(rows, known):
            return self._hidden.index_select(0, on_device)
        return self._kernels.select_rows(self._hidden, rows)

    def try_argmax(self, rows: Ints, adapters: Adapters = ()) -> None:
        """There is no way to."""

    @torch.inference_mode()
    def hidden(self, first: int, num_rows: int) -> npt.NDArray[np.float32]:
        return self._kernels.to_numpy(self._hidden[first : first + num_rows])


class _LoraOps:
    """Implements `ops.Ops`: the backend's, for rows some of which have an adapter."""

    def __init__(self, kernels: TritonKernels, adapters: Adapters) -> None:
        self._kernels = kernels
        self._lora = LoraBatch(adapters, kernels.device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernels, name)

    def adapt(self, y: torch.Tensor, x: torch.Tensor, site: int) -> torch.Tensor:
        return self._lora.add(y, x, site)


class _Planned:
    """The attention of a step on the host. One token of every request: padded, so that it can be captured."""

    def __init__(
        self, batch: ForwardBatch, shapes: Sequence[AttentionShape], configs: Sequence[AttentionConfig]
    ) -> None:
        self._plans = [
            make_plan(shape, batch.query_start_loc, batch.seq_lens, group.block_tables, config)
            for shape, config, group in zip(shapes, configs, batch.groups, strict=True)
        ]
        self.num_tokens = len(batch.token_ids)
        self._sizes = [plan.sizes for plan in self._plans]
        self.is_captured = False
        if self.num_tokens == len(batch.seq_lens) <= _MAX_CAPTURED and not batch.adapters:
            size = padded_size(self.num_tokens)
            room = [
                PlanSizes.for_decodes(size, 1, shape.num_kv_heads, config)
                for shape, config in zip(shapes, configs, strict=True)
            ]
            if all(room.holds(plan.sizes) for room, plan in zip(room, self._plans, strict=True)):
                self.num_tokens, self._sizes, self.is_captured = size, room, True
        self.words = [self._pack(*pair) for pair in zip(self._plans, self._sizes, strict=True)]

    @property
    def key(self) -> tuple[int, ...]:
        """What the addresses and grids of a captured step depend on."""
        return (self.num_tokens, *(len(words) for words in self.words))

    def on_device(self, words: Sequence[torch.Tensor]) -> list[AttentionPlan]:
        return [
            plan_on_device(plan, part, sizes, plan.config.max_slots if self.is_captured else plan.num_slots)
            for plan, part, sizes in zip(self._plans, words, self._sizes, strict=True)
        ]

    def _pack(self, plan: HostPlan, sizes: PlanSizes) -> Words:
        words = plan.pack(sizes)
        if not self.is_captured:
            return words
        size = sizes.starts()[-1] + max(_LEAST_TABLES, 1 << (len(plan.tables) - 1).bit_length())
        return np.concatenate([words, np.zeros(size - len(words), dtype=np.int32)])


def padded_size(num_tokens: int) -> int:
    """1, 2, 4, 8, then multiples of 8 up to 64, of 16 up to 256, of 32 above."""
    if num_tokens <= 8:
        return 1 << (num_tokens - 1).bit_length()
    step = 8 if num_tokens <= 64 else 16 if num_tokens <= 256 else 32
    return -(-num_tokens // step) * step
