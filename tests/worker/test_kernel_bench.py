"""The kernel benchmark on tiny models: ceilings that can be, and every kernel of the model measured once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gguf
import pytest

from pelton.bench.roofline import Ceilings, KernelBenchPlan, KernelReport
from pelton.core.errors import ConfigError
from pelton.weights.model_files import open_model
from pelton.worker.kernels.cpu.measure.kernels import make_runtime, measure_ceilings, measure_kernels
from tests.weights.make_models import TINY_CONFIGS, random_tensors, write_gguf
from tests.worker.native import ISAS

pytestmark = pytest.mark.torch  # tests.worker.native imports it

PLAN = KernelBenchPlan(rows=(1, 3, 65), contexts=(40, 70), decode_requests=(1, 3), prefill_tokens=50, budget_s=0.001)


@pytest.fixture(scope="module")
def ceilings() -> Ceilings:
    return measure_ceilings(2, 128 << 20)


def measure(folder: Path, name: str, ceilings: Ceilings, isa: str | None = None) -> KernelReport:
    config = TINY_CONFIGS[name]
    quantized = gguf.GGMLQuantizationType.Q8_0
    path = write_gguf(folder / "tiny.gguf", config, random_tensors(config), quantized=quantized)
    return measure_kernels(open_model(path), make_runtime(isa, 2), ceilings, PLAN, lambda _: None)


def test_ceilings(ceilings: Ceilings) -> None:
    assert ceilings.dram_bytes == 32 << 20
    rates = {ceiling.name: ceiling for ceiling in ceilings.ceilings}
    assert len(rates) == len(ceilings.ceilings)
    assert {"dram", "l2", "fp32_plain", "int8_plain"} <= set(rates)
    for ceiling in rates.values():
        assert 1e8 < ceiling.one_thread < 1e15, ceiling
        assert 1e8 < ceiling.all_threads < 1e15, ceiling
        assert ceiling.is_memory == (ceiling.name in ("dram", "l3", "l2"))


@pytest.mark.parametrize("isa", ISAS)
def test_every_kernel_at_every_size(tmp_path: Path, ceilings: Ceilings, isa: str) -> None:
    report = measure(tmp_path, "qwen2", ceilings, isa)
    assert (report.isa, report.num_threads, report.skipped) == (isa, 2, ())
    sizes = [(f.work.kernel, f.work.num_rows, f.work.detail) for f in report.figures]
    assert len(set(sizes)) == len(sizes)
    counts = {kernel: sum(name == kernel for name, _, _ in sizes) for kernel, _, _ in sizes}
    assert list(counts.items()) == [
        ("qkv", 3),
        ("o", 3),
        ("gate_up", 3),
        ("down", 3),
        ("gated_mlp", 3),
        ("lm_head", 2),  # never for more than 64 rows
        ("attention decode", 4),
        ("attention prefill", 2),
        ("add_rms_norm", 3),
        ("gated activation", 3),
        ("rotary and store", 3),
        ("sampling, greedy", 2),
    ]
    for figure in report.figures:
        assert figure.time_s > 0
        assert figure.share > 0
        assert figure.num_calls >= 3


def test_what_a_kernel_must_do(tmp_path: Path, ceilings: Ceilings) -> None:
    figures = measure(tmp_path, "qwen2", ceilings).figures
    works = {(f.work.kernel, f.work.num_rows, f.work.detail): f.work for f in figures}
    qkv = works["qkv", 3, "128 x 64 Q8_0"]
    assert qkv.num_ops == 2 * 3 * 64 * 128
    assert qkv.num_bytes == 128 * 64 * 34 / 32
    decode = works["attention decode", 3, "context 70"]  # 4 heads over 2 of keys, 16 wide
    assert decode.num_ops == 3 * 70 * 4 * 16 * 4
    assert decode.num_bytes == 3 * 70 * 2 * 16 * 2 * 2
    prefill = works["attention prefill", 50, "context 70"]
    assert prefill.num_ops == sum(range(21, 71)) * 4 * 16 * 4
    assert prefill.num_bytes == 70 * 2 * 16 * 2 * 2


def test_windows_are_kernels_of_their_own(tmp_path: Path, ceilings: Ceilings) -> None:
    figures = measure(tmp_path, "gemma3", ceilings).figures
    details = {f.work.detail: f.work for f in figures if f.work.kernel == "attention decode" and f.work.num_rows == 1}
    assert list(details) == ["context 40", "context 70", "context 40, window 16", "context 70, window 16"]
    assert details["context 70, window 16"].num_bytes == 16 * 2 * 32 * 2 * 2


def test_what_is_multiplied_in_float32_is_named(
    tmp_path: Path, ceilings: Ceilings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pelton.worker.kernels.cpu.packed_weights._FORMATS", {"Q4_0"})
    report = measure(tmp_path, "llama", ceilings)
    assert report.skipped[0] == "qkv: Q8_0 of 64 inputs is kept in floats"
    assert len(report.skipped) == 5
    assert report.figures[0].work.kernel == "attention decode"


def test_unknown_isa() -> None:
    with pytest.raises(ConfigError, match="sse9"):
        make_runtime("sse9", 1)


def test_no_torch() -> None:
    """`pelton bench kernels` must not pay for it."""
    code = "import sys; import pelton.worker.kernels.cpu.measure.kernels; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
