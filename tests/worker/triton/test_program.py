"""Models on the backend: steps padded and planned for a device, against the reference; law 3; tokens that are late."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from pathlib import Path

import numpy as np
import pytest
import torch

from pelton.weights.model_files import open_model
from pelton.worker.kernels.ops import make_kernels
from pelton.worker.kernels.triton import program as program_module
from pelton.worker.kernels.triton.program import TritonProgram, padded_size
from pelton.worker.models.registry import load_model
from tests.worker.tiny_models import REFERENCE, VOCAB_SIZE, PagedModel, save_tiny

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:overflow encountered")]


class ReplayedGraphs:
    """As CUDA's: what was recorded first is what runs again, over the tensors that it saw then."""

    def __init__(self) -> None:
        self.recorded: dict[Hashable, Callable[[], torch.Tensor]] = {}
        self.num_replays = 0

    def run(self, key: Hashable, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        self.num_replays += key in self.recorded
        return self.recorded.setdefault(key, run)()

    def clear(self) -> None:
        self.recorded.clear()


def make_prompt(size: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB_SIZE, size).tolist()


def make_pair(row: str, folder: Path) -> tuple[PagedModel, PagedModel]:
    save_tiny(row, folder)
    files = open_model(folder)
    return tuple(  # type: ignore[return-value]
        PagedModel(load_model(files, kernels), num_blocks=60) for kernels in (make_kernels("triton"), REFERENCE)
    )


def run_mixed(model: PagedModel) -> list[torch.Tensor]:
    """Prompts in chunks, decodes beside them, decodes alone."""
    requests = [model.add(make_prompt(size, size)) for size in (13, 9, 3)]
    model.step([(requests[0], 10), (requests[1], 4)])
    model.step([(requests[0], 1), (requests[1], 3), (requests[2], 1)])
    for _ in range(2):
        model.step([(request, 1) for request in requests])
    return [torch.cat(request.logits) for request in requests]


@pytest.mark.parametrize("row", ["qwen3", "gemma2", "qwen3-moe"])
def test_logits_are_the_references(row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured steps are replayed as on a GPU: a tensor that moved, or a number that was not on the device, shows."""
    graphs = ReplayedGraphs()
    monkeypatch.setattr(program_module, "make_graphs", lambda _: graphs)
    ours, reference = make_pair(row, tmp_path)
    assert isinstance(ours.program, TritonProgram)
    for found, expected in zip(run_mixed(ours), run_mixed(reference), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert graphs.num_replays == 1
    assert len(graphs.recorded) == 1


def test_a_request_is_the_same_alone_and_in_any_company(tmp_path: Path) -> None:
    ours, _ = make_pair("llama", tmp_path)
    mixed = run_mixed(ours)[1]
    # Tiles of one size here: numpy, which the interpreter multiplies with, sums up by a matrix's shape.
    assert torch.equal(ours.run(ours.add(make_prompt(9, 9)), 5), mixed)


def test_padded_sizes_hold_and_do_not_waste() -> None:
    sizes = [padded_size(size) for size in range(1, 513)]
    assert all(padded >= size for size, padded in enumerate(sizes, 1))
    assert all(padded - size < max(8, size / 2) for size, padded in enumerate(sizes, 1))
    assert len(set(sizes)) < 35
    assert [padded_size(size) for size in sizes] == sizes


def test_late_tokens_are_taken_from_the_device(tmp_path: Path) -> None:
    ours, _ = make_pair("llama", tmp_path)
    prompts = [make_prompt(5, 1), make_prompt(5, 2)]
    known, late = ([ours.add(list(prompt)) for prompt in prompts] for _ in range(2))
    results = []
    for requests in (known, late):
        ours.step([(request, 4) for request in requests])
        batch = ours.make_batch([(request, 1) for request in requests])
        if requests is late:
            wanted = torch.tensor([prompts[1][4], prompts[0][4]], dtype=torch.int32)
            batch.token_ids[:] = 0
            ours.program.forward(batch, wanted, np.array([1, 0]))
        else:
            ours.program.forward(batch)
        results.append(ours.program.logits(np.array([0, 1])).clone())
    assert torch.equal(*results)
