"""FlashInfer behind attention, with a stand-in that computes what its plan's arguments say; the real one's signatures
where it is installed. What only a GPU can show is an item of `make gpu-check`."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.gpu import flashinfer_item

from pelton.weights.model_files import open_model
from pelton.worker.kernels.ops import AttentionShape, LayerCache
from pelton.worker.kernels.triton import flashinfer_attention
from pelton.worker.kernels.triton.backend import TritonKernels
from pelton.worker.kernels.triton.flashinfer_attention import can_serve, find_rivals, page_arguments
from pelton.worker.models.registry import load_model
from tests.worker.tiny_models import REFERENCE, PagedModel, save_tiny
from tests.worker.triton.test_program import run_mixed

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:overflow encountered")]

CPU = torch.device("cpu")
SHAPE = AttentionShape(4, 2, 64, 16, None)


class StandIn:
    """For `BatchPrefillWithPagedKVCacheWrapper`: causal attention of the last tokens of each request."""

    made: list[StandIn]
    factor = 1.0

    def __init__(self, workspace: torch.Tensor, kv_layout: str) -> None:
        assert (workspace.dtype, kv_layout) == (torch.uint8, "NHD")
        self.made.append(self)
        self.num_runs = self.num_plans = 0

    def plan(self, **arguments: Any) -> None:
        self.told = SimpleNamespace(**arguments)
        self.num_plans += 1

    def run(self, query: torch.Tensor, caches: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        self.num_runs += 1
        told, results = self.told, []
        assert told.causal
        assert query.is_contiguous()
        assert query.shape[1:] == (told.num_qo_heads, told.head_dim_qk)
        assert query.dtype == told.q_data_type == told.kv_data_type == caches[0].dtype
        for row in range(len(told.qo_indptr) - 1):
            own = query[told.qo_indptr[row] : told.qo_indptr[row + 1]].float()
            blocks = told.paged_kv_indices[told.paged_kv_indptr[row] : told.paged_kv_indptr[row + 1]].long()
            length = (len(blocks) - 1) * told.page_size + int(told.paged_kv_last_page_len[row])
            keys, values = (cache[blocks].flatten(0, 1)[:length].float() for cache in caches)
            group = told.num_qo_heads // told.num_kv_heads
            scores = torch.einsum("tkgd,lkd->tkgl", own.unflatten(1, (-1, group)), keys) * told.sm_scale
            hidden = torch.arange(length)[None, :] > torch.arange(length - len(own), length)[:, None]
            weights = scores.masked_fill(hidden[:, None, None], -torch.inf).softmax(-1)
            results.append(torch.einsum("tkgl,lkd->tkgd", weights, values).flatten(1, 2))
        return (self.factor * torch.cat(results)).to(query.dtype)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    """Installed, for all that anybody can tell, and twice as fast."""
    module: Any = ModuleType("flashinfer")
    module.BatchPrefillWithPagedKVCacheWrapper = StandIn
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr(StandIn, "made", [], raising=False)
    monkeypatch.setattr(flashinfer_attention, "is_installed", lambda _: True)
    # The interpreter's models have small heads and numbers of 32 bits.
    monkeypatch.setattr(flashinfer_attention, "_HEAD_DIMS", range(256))
    monkeypatch.setattr(flashinfer_attention, "_DTYPES", (torch.float32,))
    monkeypatch.setattr(flashinfer_attention, "_TRIAL_TOKENS", 48)
    times_ms = {True: 2.0, False: 1.0}
    monkeypatch.setattr(
        flashinfer_attention, "time_ms", lambda launch, _: times_ms["own" in inspect.getclosurevars(launch).nonlocals]
    )
    return StandIn


def make_caches(shape: AttentionShape = SHAPE, dtype: torch.dtype = torch.float32) -> list[LayerCache]:
    caches = torch.full((2, 5, shape.block_size, shape.num_kv_heads, shape.head_dim), torch.nan, dtype=dtype)
    return [LayerCache(0, *caches)]


def test_prompts_go_through_it_and_decodes_do_not(stand_in: type[StandIn], tmp_path: Path) -> None:
    save_tiny("qwen3", tmp_path)
    files = open_model(tmp_path)
    kernels = TritonKernels("float32", batch_invariant=False)
    ours, reference = (PagedModel(load_model(files, each), num_blocks=60) for each in (kernels, REFERENCE))
    assert kernels.name.endswith(", flashinfer")
    (wrapper,) = stand_in.made
    num_layers = files.spec.num_layers
    wrapper.num_runs = wrapper.num_plans = 0
    for found, expected in zip(run_mixed(ours), run_mixed(reference), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    # Of four steps two are decodes alone. A step is planned once for all layers.
    assert (wrapper.num_plans, wrapper.num_runs) == (2, 2 * num_layers)


def test_layers_with_a_cap_or_a_window_keep_the_own_kernel(stand_in: type[StandIn], tmp_path: Path) -> None:
    save_tiny("gemma2", tmp_path)
    files = open_model(tmp_path)
    kernels = TritonKernels("float32", batch_invariant=False)
    ours, reference = (PagedModel(load_model(files, each), num_blocks=60) for each in (kernels, REFERENCE))
    (wrapper,) = stand_in.made  # the group without a window won its trial, and has a cap
    wrapper.num_runs = 0
    for found, expected in zip(run_mixed(ours), run_mixed(reference), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert wrapper.num_runs == 0


def test_with_batch_invariance_it_is_not_even_imported(stand_in: type[StandIn], tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    kernels = TritonKernels("float32")
    PagedModel(load_model(open_model(tmp_path), kernels), num_blocks=60)
    assert "flashinfer" not in kernels.name
    assert not stand_in.made


@pytest.mark.parametrize("problem", ["slower", "wrong", "broken", "not importable", "not installed"])
def test_what_does_not_win_its_trial_is_not_used(
    problem: str, stand_in: type[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("nvcc is not there")

    if problem == "slower":
        monkeypatch.setattr(flashinfer_attention, "time_ms", lambda *_: 1.0)
    elif problem == "wrong":
        monkeypatch.setattr(stand_in, "factor", 1.1)
    elif problem == "broken":
        monkeypatch.setattr(stand_in, "plan", refuse)
    elif problem == "not importable":
        monkeypatch.setitem(sys.modules, "flashinfer", ModuleType("flashinfer"))
    else:
        monkeypatch.setattr(flashinfer_attention, "is_installed", lambda _: False)
    assert find_rivals([SHAPE], make_caches(), torch.float32, CPU) == [None]


def test_a_trial_that_is_won(stand_in: type[StandIn]) -> None:
    caches = make_caches()
    (rival,) = find_rivals([SHAPE], caches, torch.float32, CPU)
    assert rival is not None
    assert len(stand_in.made) == 1
    assert caches[0].keys[0].isnan().all()  # the null block is not part of a trial


def test_what_it_can_serve() -> None:
    cache = torch.empty(5, 16, 2, 64, dtype=torch.bfloat16)
    assert can_serve(SHAPE, cache, torch.bfloat16)
    assert not can_serve(SHAPE, cache[:2], torch.bfloat16)
    assert not can_serve(AttentionShape(4, 2, 64, 16, 512), cache, torch.bfloat16)
    assert not can_serve(AttentionShape(4, 2, 80, 16, None), cache, torch.bfloat16)
    assert not can_serve(SHAPE, cache, torch.float16)
    assert not can_serve(SHAPE, cache.view(torch.uint8), torch.bfloat16)


def test_pages_of_a_step() -> None:
    """A prompt's second chunk of 20 tokens, 48 in all; a decode at position 0; one at position 16."""
    tables = np.array([[7, 3, 9], [5, 0, 0], [2, 8, 0]])
    found = page_arguments(np.array([0, 20, 21, 22]), np.array([48, 1, 17]), tables, 16)
    assert {name: values.tolist() for name, values in found.items()} == {
        "qo_indptr": [0, 20, 21, 22],
        "paged_kv_indptr": [0, 3, 4, 6],
        "paged_kv_indices": [7, 3, 9, 5, 2, 8],
        "paged_kv_last_page_len": [16, 1, 1],
    }
    assert all(values.dtype == torch.int32 for values in found.values())


def test_the_real_one_takes_these_arguments() -> None:
    flashinfer = pytest.importorskip("flashinfer")
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper
    inspect.signature(wrapper.__init__).bind(None, torch.empty(0), "NHD")
    arguments = page_arguments(np.array([0, 1]), np.array([1]), np.array([[1]]), 16)
    names = ("num_qo_heads", "num_kv_heads", "head_dim_qk", "page_size", "causal", "sm_scale")
    inspect.signature(wrapper.plan).bind(None, **arguments, **dict.fromkeys((*names, "q_data_type", "kv_data_type"), 1))
    inspect.signature(wrapper.run).bind(None, torch.empty(0), (torch.empty(0), torch.empty(0)))


def test_the_checks_item_compares_results_and_speed(stand_in: type[StandIn], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashinfer_item, "_TOKENS", (32,))
    monkeypatch.setattr(flashinfer_item, "LLAMA", (4, 2, 16))
    monkeypatch.setattr(flashinfer_item, "QWEN", (2, 1, 16))
    monkeypatch.setattr(flashinfer_item, "is_installed", lambda _: True)
    rows = list(flashinfer_item.beside_flashinfer(CPU))
    assert [row["name"] for row in rows] == ["8B, prompt of 32", "0.5B, prompt of 32"], rows
    assert all(row["difference"] < 2e-2 and row["own_beside_flashinfer"] == 0.5 for row in rows)
    assert [wrapper.num_runs for wrapper in stand_in.made] == [1, 1]
    monkeypatch.setattr(flashinfer_item, "is_installed", lambda _: False)
    assert list(flashinfer_item.beside_flashinfer(CPU)) == [{"flashinfer": "not installed"}]
