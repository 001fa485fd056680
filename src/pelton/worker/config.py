"""Settings of the data plane. Imports no torch, so that the CLI can read it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from pelton.core.config import setting
from pelton.core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    device: str = setting(
        "auto", "where the model runs; auto: an NVIDIA GPU where there is one", choices=("auto", "cpu", "cuda")
    )
    dtype: str = setting(
        "auto",
        "type of weights and activations; auto: float32 on a CPU, bfloat16 on a GPU",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    kv_cache_dtype: str = setting(
        "auto",
        "type of keys and values; auto: bfloat16 with native kernels, else that of the activations; fp8, int8, int4: "
        "on a GPU, a scale for each token and head",
        choices=("auto", "float32", "bfloat16", "float16", "fp8", "int8", "int4"),
    )
    kernel_backend: str = setting(
        "auto",
        "kernels to run; auto: the fastest for device and dtype",
        choices=("auto", "native", "reference", "triton"),
    )
    enable_weight_cache: bool = setting(True, "keep repacked weights on disk, for later starts to map")
    weight_cache_dir: str | None = setting(None, "where they are kept; default: .packed beside the pulled models")
    activation_dtype: str = setting(
        "auto",
        "type that activations are rounded to in products (native kernels) with quantized weights, and in AMX tiles "
        "with bfloat16 ones; auto: the fastest",
        choices=("auto", "int8", "bfloat16", "float32"),
    )
    batch_invariance: bool = setting(
        True,
        "same bits of a request whatever runs beside it; off: on a GPU products and attention may be faster where "
        "other requests decide how (CPUs have nothing to gain, and keep it)",
    )
    tensor_parallel_size: int = setting(
        1, "processes, and on GPUs devices, that share a model's matrices out among them", alias="-tp"
    )
    threads: int | None = setting(None, "compute threads; default: the cores this process may use")

    def __post_init__(self) -> None:
        if self.tensor_parallel_size < 1:
            raise ConfigError(f"tensor_parallel_size is {self.tensor_parallel_size}; it must be at least 1")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads is {self.threads}; it must be at least 1")
        if self.device == "cuda" and self.kernel_backend in ("native", "reference"):
            raise ConfigError(f"device is cuda, but {self.kernel_backend} kernels run on a CPU: use triton or auto")

    def require_packages(self) -> None:
        """Raises `ConfigError` where these settings need a package that is not installed."""
        if self.kernel_backend == "triton" or self.device == "cuda":
            require_triton()
        elif (
            self.kernel_backend == "reference" or self.dtype in ("bfloat16", "float16") or self.tensor_parallel_size > 1
        ):
            require_torch()


def has_gpu() -> bool:
    """Whether there is an NVIDIA GPU, and what its kernels need is installed. Imports neither."""
    return Path("/dev/nvidiactl").exists() and all(find_spec(name) is not None for name in ("torch", "triton"))


def require_torch() -> None:
    if find_spec("torch") is None:
        raise ConfigError(
            "the reference kernels (--kernel-backend reference, --dtype bfloat16 or float16, --tensor-parallel-size) "
            "need torch: pip install 'pelton[reference]'"
        )


def require_triton() -> None:
    missing = [name for name in ("torch", "triton") if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"the Triton kernels (--kernel-backend triton) need {' and '.join(missing)}: pip install 'pelton[gpu]'"
        )
