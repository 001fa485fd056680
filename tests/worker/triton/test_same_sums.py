"""Law 3 by design: what a row's sum depends on is the same for every number of rows, in the tables and as compiled.

The interpreter multiplies with numpy, whose order of sums depends on a matrix's shape; so the order itself is looked
at here, and bits are compared in `test_linear.py` where sums are exact.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pelton.weights.tensors import WeightTensor
from pelton.worker.config import WorkerConfig
from pelton.worker.kernels.ops import AttentionShape, choose_kernels
from pelton.worker.kernels.triton import tiles
from pelton.worker.kernels.triton.attention_config import choose_config
from pelton.worker.kernels.triton.backend import TritonKernels
from pelton.worker.kernels.triton.linear import linear
from tests.worker.triton.test_linear import load

pytestmark = pytest.mark.torch

ROOT = Path(__file__).resolve().parents[3]
NUMBERS_OF_ROWS = [*range(1, 300), 512, 4096, 8192, 100_000]
COMPILE = """
import sys
sys.path.insert(0, "scripts")
import torch
from compile_triton import Compiler, differing
from benchmarks.gpu.compile_cases import cases
from pelton.worker.kernels.triton.norm import rms_norm
compiler, rows = Compiler(), []
for label, launch in cases():
    name, _, number = label.rpartition(", ")
    if number in ("1 rows", "32 rows", "512 rows") and name in ("bf16", "fp8", "int4 groups of 128"):
        rows += compiler.collect(label, launch)
products = [row for row in rows if row.num_wgmma]
assert len(products) == 9, rows
assert not any(row.num_mma for row in rows), rows
assert differing(rows) == [], differing(rows)
norms = set()
for num_rows in (1, 15, 16, 64):
    for row in compiler.collect("norm", lambda: rms_norm(torch.empty(num_rows, 4096), torch.empty(4096), 1e-6)):
        norms.add(row.hash)
assert len(norms) == 1, norms
"""


@pytest.mark.parametrize("kind", tiles.TABLES)
def test_a_sum_has_one_order_whatever_the_number_of_rows(kind: str) -> None:
    assert len({tiles.order_of_sums(kind, num_rows) for num_rows in NUMBERS_OF_ROWS}) == 1
    for num_rows in NUMBERS_OF_ROWS:
        tile = tiles.choose_tile(kind, num_rows)
        # 64 outputs are the left side of a `wgmma`; the right side takes 8 to 256 rows, 16 in a product of Triton.
        assert tile.outputs * 4 // tile.num_warps == 64
        assert 16 <= tile.rows <= 256
        assert tile.outputs % 64 == 0


@pytest.mark.parametrize("heads", [(32, 8, 128), (14, 2, 64), (16, 8, 256), (128, 2, 128), (8, 8, 80)])
def test_attentions_tiles_fill_the_same_instruction(heads: tuple[int, int, int]) -> None:
    config = choose_config(AttentionShape(*heads, 16, None))
    for num_rows in (config.narrow_rows, config.wide_rows):
        assert num_rows % 64 == 0
    assert config.chunk_positions % config.tile_positions == 0


def test_kernels_compile_to_the_same_instructions_for_every_number_of_rows() -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_setting_reaches_the_products() -> None:
    for wanted in (True, False):
        kernels = choose_kernels(WorkerConfig(kernel_backend="triton", batch_invariance=wanted))
        assert isinstance(kernels, TritonKernels)
        assert kernels.batch_invariant is wanted
        assert choose_kernels(WorkerConfig(kernel_backend="reference", batch_invariance=wanted), 1).name == "reference"


def test_prefill_and_decode_of_whole_numbers_agree_to_the_bit() -> None:
    """Through tiles of every number of rows: sums of small whole numbers are exact in any order, so what differs
    would be an input that a tile left out or took twice."""
    rng = np.random.default_rng(3)
    values = rng.integers(-3, 4, (96, 192)).astype(np.float32)
    weight = load([WeightTensor("w", (96, 192), "F32", values.reshape(-1).view(np.uint8))], torch.bfloat16)
    x = torch.from_numpy(rng.integers(-3, 4, (130, 192)).astype(np.float32)).bfloat16()
    exact = (x.double() @ torch.from_numpy(values).double().T).bfloat16()
    for num_rows in (1, 16, 17, 33, 65, 130):
        assert torch.equal(linear(x[:num_rows], weight), exact[:num_rows])
