"""The backend as a whole: whom it refuses, and models on it against the reference."""

from __future__ import annotations

import sys

import pytest
import torch

from pelton.core.errors import ConfigError
from pelton.worker.config import WorkerConfig
from pelton.worker.kernels.ops import make_kernels
from pelton.worker.kernels.triton import device

pytestmark = pytest.mark.torch


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    for refused in (lambda: make_kernels("triton"), WorkerConfig(kernel_backend="triton").require_packages):
        with pytest.raises(ConfigError, match=r"need triton: pip install 'pelton\[gpu\]'"):
            refused()


def test_without_a_gpu_only_the_interpreter_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_kernels("triton").name == "triton (interpreted)"
    monkeypatch.setattr(device, "is_interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="need an NVIDIA GPU, and torch finds none"):
        make_kernels("triton")


def test_activation_types_are_native_kernels_alone() -> None:
    with pytest.raises(ConfigError, match="only native kernels round activations"):
        make_kernels("triton", activation_dtype="int8")


def test_float8_needs_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = make_kernels("triton")
    assert "fp8" in kernels.kv_dtypes
    kernels.round_weights("fp8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert not device.has_float8(torch.device("cuda"))
    monkeypatch.setattr("pelton.worker.kernels.triton.backend.has_float8", lambda _: False)
    kernels = make_kernels("triton")
    assert "fp8" not in kernels.kv_dtypes
    assert "int8" in kernels.kv_dtypes
    for name in ("fp8", "fp8_block"):
        with pytest.raises(ConfigError, match=r"capability 8\.9 or more: use w8a8 or int4"):
            kernels.round_weights(name)
