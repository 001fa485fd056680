"""Recorded programs and what they need beside the other kernels: embedding tables, slots, checked inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from pelton.core.model_spec import ModelSpec, RopeSpec, make_kv_groups
from pelton.weights.dequantize import dequantize_rows
from pelton.weights.gguf.formats import FORMATS
from pelton.weights.tensors import WeightTensor
from pelton.worker.forward_batch import ForwardBatch, GroupBatch
from pelton.worker.kernels.cpu import pelton_cpu
from pelton.worker.kernels.cpu.backend import NativeKernels
from pelton.worker.kernels.cpu.program import NativeProgram
from pelton.worker.kernels.cpu.recorder import Recorder
from pelton.worker.kv_storage import KVStorage
from pelton.worker.layers.rotary import Rotation, rotary_tables
from pelton.worker.models.registry import compile_model, make_dummy_model

KERNELS = NativeKernels(2)


@pytest.mark.parametrize(
    "format_name", [name for name in FORMATS if not name.startswith(("INT", "FP8"))]
)  # never tables
@pytest.mark.parametrize("scale", [1.0, 33.94112549695428])
def test_embedding_gives_the_bits_of_dequantize(format_name: str, scale: float) -> None:
    """Random bytes: every code, and scales that are NaN, infinite or subnormal."""
    layout = FORMATS[format_name]
    num_rows, width = 300, 3 * layout.block_size
    rng = np.random.default_rng(0)
    table = WeightTensor(
        "w", (num_rows, width), format_name, rng.integers(0, 256, 3 * num_rows * layout.block_bytes, dtype=np.uint8)
    )
    token_ids = rng.permutation(num_rows)[:299]
    with np.errstate(all="ignore"):
        expected = dequantize_rows(table, token_ids) * np.float32(scale)
    result = KERNELS.embedding(token_ids, table, scale)
    numbers = ~np.isnan(expected)
    assert numbers.sum() > 500
    np.testing.assert_array_equal(np.isnan(result), ~numbers)
    np.testing.assert_array_equal(result.view(np.uint32)[numbers], expected.view(np.uint32)[numbers])


@pytest.mark.parametrize(
    ("format_name", "num_bytes", "shape", "words"),
    [
        ("Q8_0", 34 * 6 - 1, (3, 64), "number of bytes"),
        ("Q8_0", 34 * 6, (3, 65), "whole blocks"),
        ("Q8_0", 34 * 6, (3, 0), "whole blocks"),
        ("F32", 24, (-3, 2), "whole blocks"),
        ("Q9_9", 34 * 6, (3, 64), "unknown"),
    ],
)
def test_damaged_tables_are_refused(format_name: str, num_bytes: int, shape: tuple[int, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pelton_cpu.EmbeddingTable(format_name, 0, num_bytes, *shape, 1.0)


def make_spec(num_layers: int) -> ModelSpec:
    return ModelSpec(
        architecture="gemma3",
        num_layers=num_layers,
        hidden_size=32,
        intermediate_size=48,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        vocab_size=97,
        max_model_len=64,
        rms_norm_eps=1e-6,
        rope=RopeSpec(theta=10_000.0, rotary_dim=8),
        rope_local=RopeSpec(theta=1_000.0, rotary_dim=8),
        kv_groups=make_kv_groups([8, None] * (num_layers // 2)),
        hidden_act="gelu_tanh",
    )


def make_program(num_layers: int = 2) -> NativeProgram:
    spec = make_spec(num_layers)
    kv = KVStorage(spec, 6, 4, "float32", KERNELS)
    program = compile_model(make_dummy_model(spec, KERNELS), kv)
    assert isinstance(program, NativeProgram)
    return program


def make_batch(num_groups: int = 2) -> ForwardBatch:
    """Two prompts of 5 and 3 tokens in blocks of 4."""
    positions = np.array([0, 1, 2, 3, 4, 0, 1, 2])
    slots = np.array([4, 5, 6, 7, 8, 12, 13, 14])
    tables = np.array([[1, 2], [3, 0]])
    groups = [GroupBatch(slots, tables, Rotation(table, positions, 5)) for table in rotary_tables(make_spec(2))]
    return ForwardBatch(
        token_ids=np.arange(8),
        query_start_loc=np.array([0, 5, 8]),
        seq_lens=np.array([5, 3]),
        groups=tuple(groups[:num_groups]),
        logits_indices=np.array([4, 7]),
    )


def with_group(batch: ForwardBatch, **changes: np.ndarray) -> ForwardBatch:
    return replace(batch, groups=(batch.groups[0], replace(batch.groups[1], **changes)))


def set_at(array: np.ndarray, index: tuple[int, ...], value: int) -> np.ndarray:
    changed = array.copy()
    changed[index] = value
    return changed


BAD_STEPS: dict[str, Callable[[ForwardBatch], ForwardBatch]] = {
    "token too large": lambda b: replace(b, token_ids=set_at(b.token_ids, (3,), 97)),
    "token negative": lambda b: replace(b, token_ids=set_at(b.token_ids, (3,), -1)),
    "slot too large": lambda b: with_group(b, slot_mapping=set_at(b.groups[1].slot_mapping, (7,), 24)),
    "slot negative": lambda b: with_group(b, slot_mapping=set_at(b.groups[1].slot_mapping, (0,), -1)),
    "block too large": lambda b: with_group(b, block_tables=set_at(b.groups[1].block_tables, (0, 1), 6)),
    "block negative": lambda b: with_group(b, block_tables=set_at(b.groups[1].block_tables, (1, 0), -1)),
    "longer than its table": lambda b: replace(b, seq_lens=np.array([9, 3])),
    "more tokens than the step": lambda b: replace(b, query_start_loc=np.array([0, 5, 9]), seq_lens=np.array([5, 4])),
    "no tokens": lambda b: replace(b, query_start_loc=np.array([0, 8, 8])),
    "lengths missing": lambda b: replace(b, seq_lens=np.array([5])),
    "slots missing": lambda b: with_group(b, slot_mapping=b.groups[1].slot_mapping[:7]),
    "angles missing": lambda b: with_group(b, cos=b.groups[1].cos[:7]),
    "angles too wide": lambda b: with_group(b, cos=np.ones((8, 5), np.float32), sin=np.ones((8, 5), np.float32)),
    "group missing": lambda b: replace(b, groups=b.groups[:1]),
    "wrong type": lambda b: replace(b, token_ids=b.token_ids.astype(np.int32)),
}


@pytest.mark.parametrize("name", list(BAD_STEPS))
def test_a_wrong_step_is_refused_and_the_next_one_runs(name: str) -> None:
    program, batch = make_program(), make_batch()
    program.forward(batch)
    expected = program.logits(batch.logits_indices).copy()
    assert np.isfinite(expected).all()
    with pytest.raises((IndexError, ValueError, TypeError)):
        program.forward(BAD_STEPS[name](batch))
    program.forward(batch)
    for row in (8, -1, 10**12):
        with pytest.raises(IndexError, match="row"):
            program.logits(np.array([0, row]))
    np.testing.assert_array_equal(program.logits(batch.logits_indices), expected)


def test_a_program_outlives_whoever_made_it() -> None:
    """Runtime, model and caches are held by the program alone."""
    spec = make_spec(2)
    kernels = NativeKernels(1)
    program = compile_model(make_dummy_model(spec, kernels), KVStorage(spec, 6, 4, "bfloat16", kernels))
    del kernels
    batch = make_batch()
    program.forward(batch)
    assert np.isfinite(program.logits(batch.logits_indices)).all()


def test_layers_share_their_slots() -> None:
    """Memory of a step does not grow with the number of layers."""
    widths = [sorted(make_program(num_layers)._body.slot_widths) for num_layers in (2, 12)]
    assert widths[0] == widths[1]


def test_a_value_that_is_still_needed_keeps_its_slot() -> None:
    recorder = Recorder()
    weight = np.ones(4, dtype=np.float32)
    first = recorder.select_rows(4)
    second = recorder.rms_norm(first, weight, 1e-6)
    third = recorder.rms_norm(second, weight, 1e-6)  # `second` ends here: the next one takes its place
    fourth = recorder.rms_norm(third, weight, 1e-6)
    normed, total = recorder.add_rms_norm(fourth, first, weight, 1e-6)
    program = pelton_cpu.Program(KERNELS.runtime, [], 0)
    recorder.build(program, total)
    assert program.slot_widths == [4, 4, 4]
    x = np.array([[3, 1, -2, 0.5]], dtype=np.float32)
    result = np.empty_like(x)
    program.run_rows(x, np.array([0]), result)
    expected = x
    for _ in range(3):
        expected = KERNELS.rms_norm(expected, weight, 1e-6)
    np.testing.assert_array_equal(result, x + expected)
    assert normed.buffer is not total.buffer


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        ("softcap", ((1, 0), 4, 30.0)),  # no such slot
        ("softcap", ((0, 1), 4, 30.0)),  # past its last column
        ("softcap", ((0, -1), 4, 30.0)),
        ("gated", (False, (0, 0), 4, (0, 0))),
        ("attend", (0, (0, 0), 0, 0, 1.0, 0.0, (0, 0))),  # no such group
    ],
)
def test_an_op_that_does_not_fit_is_refused(op: str, arguments: tuple[object, ...]) -> None:
    program = pelton_cpu.Program(KERNELS.runtime, [], 0)
    program.add_slot(4)
    with pytest.raises(ValueError, match=r"view|group"):
        getattr(program, op)(*arguments)
