"""`NativeProgram`: a model recorded once; a step is one native call, and so are the logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pelton.worker.forward_batch import Adapters, ForwardBatch, adapters_among
from pelton.worker.kernels.cpu import pelton_cpu
from pelton.worker.kernels.cpu.adapter import native_rows
from pelton.worker.kernels.cpu.arrays import Floats, Ints, address, is_bfloat16, native_shape
from pelton.worker.kernels.cpu.recorder import GroupInput, Recorder
from pelton.worker.kernels.ops import AttentionContext, AttentionShape, Forward, LayerCache


class NativeProgram:
    """Implements `ops.Program`."""

    def __init__(
        self,
        runtime: pelton_cpu.Runtime,
        model: Forward,
        shapes: Sequence[AttentionShape],
        caches: Sequence[LayerCache],
    ) -> None:
        self._owners = (model, tuple(caches))  # of what the programs point to
        keys = caches[0].keys
        bf16 = is_bfloat16(keys)
        self._body = pelton_cpu.Program(runtime, [native_shape(shape, bf16) for shape in shapes], len(keys))
        recorder = Recorder()
        hidden = model.forward(recorder, None, [_recorded_context(cache) for cache in caches])
        self._labels = recorder.build(self._body, hidden)
        self._head = pelton_cpu.Program(runtime, [], 0)
        recorder = Recorder()
        logits = model.compute_logits(recorder, recorder.select_rows(hidden.buffer.width))
        self._labels += recorder.build(self._head, logits)
        self._output = recorder.only_product()
        self._runtime = runtime
        self._hidden = _Rows(hidden.buffer.width)
        self._logits = _Rows(logits.buffer.width)

    def time_ops(self) -> None:
        """From now on every op is timed."""
        self._body.time_ops()
        self._head.time_ops()

    def take_times(self) -> list[tuple[str, float]]:
        """Label and seconds of every op in the order of a step, summed over the calls since this was last asked."""
        return list(zip(self._labels, [*self._body.take_times(), *self._head.take_times()], strict=True))

    def forward(self, batch: ForwardBatch, late_tokens: object = None, late_rows: object = None) -> None:
        del late_tokens, late_rows  # nothing is late on the host
        groups = [(group.slot_mapping, group.cos, group.sin, group.block_tables) for group in batch.groups]
        hidden = self._hidden.take(len(batch.token_ids))
        adapters = native_rows(batch.adapters)
        self._body.run_step(batch.token_ids, batch.query_start_loc, batch.seq_lens, groups, hidden, adapters)

    def logits(self, rows: Ints, adapters: Adapters = ()) -> Floats:
        logits = self._logits.take(len(rows))
        self._head.run_rows(self._hidden.taken, rows, logits, native_rows(adapters_among(adapters, rows)))
        return logits

    def try_argmax(self, rows: Ints, adapters: Adapters = ()) -> list[int] | None:
        if self._output is None or adapters_among(adapters, rows):
            return None
        weight, bias = self._output
        hidden = self._hidden.taken[rows]
        token_ids = self._runtime.greatest_columns(weight, address(hidden), len(rows), bias)
        return None if pelton_cpu.NO_COLUMN in token_ids else token_ids

    def hidden(self, first: int, num_rows: int) -> Floats:
        return self._hidden.taken[first : first + num_rows]


def _recorded_context(cache: LayerCache) -> AttentionContext:
    group = GroupInput(cache.group_id)
    return AttentionContext(group, group, group, group, cache.keys, cache.values)


class _Rows:
    """Memory for a result, kept from step to step: fresh pages would cost more than filling them."""

    def __init__(self, width: int) -> None:
        self._memory = np.empty((0, width), dtype=np.float32)
        self.taken = self._memory

    def take(self, num_rows: int) -> Floats:
        """[num_rows, width], whose contents are undefined; what was taken before must not be used again."""
        if num_rows > len(self._memory):
            self._memory = np.empty((num_rows, self._memory.shape[1]), dtype=np.float32)
        self.taken = self._memory[:num_rows]
        return self.taken
