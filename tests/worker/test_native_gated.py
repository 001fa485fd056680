"""Feed-forward layers of weights in groups, in one op: what lies between its products stays in the caches."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from pelton.worker.kernels.cpu import pelton_cpu
from tests.worker.native import ISAS, native, random_packed

F32 = npt.NDArray[np.float32]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("gate", "up", "down"), [("Q5_0", "Q5_0", "Q8_0"), ("Q4_K", "Q6_K", "Q4_K")])
@pytest.mark.parametrize("gelu", [False, True])
def test_one_op_gives_what_its_parts_give(isa: str, gate: str, up: str, down: str, gelu: bool) -> None:
    """Bit for bit, with activations in 8 bits; alone, among few (some panels at a time) and among many."""
    num_inputs, size, num_outputs = 256, 1280, 70
    kernels = native(isa, 2, "int8")
    loader = kernels.make_linear_loader()
    wide = loader.load([random_packed(gate, size, num_inputs), random_packed(up, size, num_inputs)])
    narrow = loader.load([random_packed(down, num_outputs, size)])
    rng = np.random.default_rng(1)
    gate_up_bias, down_bias = (rng.standard_normal(width, dtype=np.float32) for width in (2 * size, num_outputs))

    def fused(rows: F32) -> F32:
        program = pelton_cpu.Program(kernels.runtime, [], 0)
        out, into = program.add_slot(num_outputs), program.add_slot(num_inputs)
        program.select_rows(num_inputs, (into, 0))
        addresses = gate_up_bias.ctypes.data, down_bias.ctypes.data
        program.gated_mlp(gelu, wide, addresses[0], narrow, addresses[1], (-1, -1), (into, 0), (out, 0))
        result = np.empty((len(rows), num_outputs), np.float32)
        program.run_rows(rows, np.arange(len(rows)), result)
        return result

    for num_rows in (1, 3, 32, 33, 300):
        x = rng.standard_normal((num_rows, num_inputs), dtype=np.float32)
        act = kernels.gelu_tanh_mul if gelu else kernels.silu_mul
        expected = kernels.linear(act(kernels.linear(x, wide, gate_up_bias)), narrow, down_bias)
        np.testing.assert_array_equal(fused(x), expected)
