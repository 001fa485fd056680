"""`EagerProgram`: a model run op by op, on any backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pelton.worker.forward_batch import Adapters, ForwardBatch, adapters_among
from pelton.worker.kernels.ops import Array, AttentionContext, AttentionShape, Forward, Kernels, LayerCache, Ops


class EagerProgram:
    """Implements `ops.Program`. The obvious way, which recorded programs are tested against."""

    def __init__(
        self, kernels: Kernels, model: Forward, shapes: Sequence[AttentionShape], caches: Sequence[LayerCache]
    ) -> None:
        self._kernels = kernels
        self._model = model
        self._shapes = shapes
        self._caches = caches
        self._hidden: Array = None

    def forward(self, batch: ForwardBatch, late_tokens: object = None, late_rows: object = None) -> None:
        del late_tokens, late_rows  # nothing is late on the host
        from_numpy = self._kernels.from_numpy
        plans = [
            self._kernels.plan_attention(shape, batch.query_start_loc, batch.seq_lens, from_numpy(group.block_tables))
            for shape, group in zip(self._shapes, batch.groups, strict=True)
        ]
        inputs = [
            (from_numpy(group.cos), from_numpy(group.sin), from_numpy(group.slot_mapping)) for group in batch.groups
        ]
        contexts = [
            AttentionContext(*inputs[cache.group_id], plans[cache.group_id], cache.keys, cache.values)
            for cache in self._caches
        ]
        self._hidden = self._model.forward(self._ops(batch.adapters), from_numpy(batch.token_ids), contexts)

    def logits(self, rows: npt.NDArray[np.int64], adapters: Adapters = ()) -> npt.NDArray[np.float32]:
        hidden = self._kernels.select_rows(self._hidden, rows)
        ops = self._ops(adapters_among(adapters, rows))
        return self._kernels.to_numpy(self._model.compute_logits(ops, hidden))

    def try_argmax(self, rows: npt.NDArray[np.int64], adapters: Adapters = ()) -> None:
        """There is no way to."""

    def hidden(self, first: int, num_rows: int) -> npt.NDArray[np.float32]:
        return self._kernels.to_numpy(self._kernels.select_rows(self._hidden, np.arange(first, first + num_rows)))

    def _ops(self, adapters: Adapters) -> Ops:
        return AdaptedOps(self._kernels, adapters) if adapters else self._kernels


class AdaptedOps:
    """Implements `ops.Ops`: a backend's, for rows some of which have an adapter."""

    def __init__(self, kernels: Kernels, adapters: Adapters) -> None:
        self._kernels = kernels
        self._adapters = adapters

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernels, name)

    def adapt(self, y: Array, x: Array, site: int) -> Array:
        return self._kernels.add_lora(y, x, site, self._adapters)
