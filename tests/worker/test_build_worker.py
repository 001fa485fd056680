"""What an executor's parts are told of each other."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from pelton.weights.config import ModelConfig
from pelton.worker.config import WorkerConfig
from pelton.worker.executors import build_worker


def test_kv_of_other_kernels_devices_and_settings_is_other_kv() -> None:
    """Law 5: what is kept on disk, and what engines tell each other when they meet."""

    def identity(name: str = "triton", device: str = "One GPU", **worker: Any) -> str:
        kernels: Any = SimpleNamespace(name=name, device_name=device, dtype="bfloat16")
        files: Any = SimpleNamespace(spec="shapes")
        model, config = ModelConfig(load_format="dummy"), WorkerConfig(**worker)
        return build_worker._kv_identity(files, model, config, kernels, ("bfloat16", 16))

    others = [
        identity(name="reference"),
        identity(device="Another GPU"),
        identity(batch_invariance=False),
        identity(activation_dtype="bfloat16"),
    ]
    assert len({identity(), *others}) == 5
    assert identity() == identity()
