"""Settings of the data plane. Imports no torch, so that the CLI can read it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from pelton.core.config import setting
from pelton.core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    dtype: str = setting(
        "auto",
        "type of weights and activations; auto: float32 on a CPU",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    kv_cache_dtype: str = setting(
        "auto",
        "type of keys and values; auto: bfloat16 with native kernels, else that of the activations",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    kernel_backend: str = setting(
        "auto", "kernels to run; auto: the fastest for the dtype", choices=("auto", "native", "reference")
    )
    enable_weight_cache: bool = setting(True, "keep repacked weights on disk, for later starts to map")
    weight_cache_dir: str | None = setting(None, "where they are kept; default: .packed beside the pulled models")
    activation_dtype: str = setting(
        "auto",
        "type that activations are rounded to in products (native kernels) with quantized weights, and in AMX tiles with "
        "bfloat16 ones; auto: the fastest",
        choices=("auto", "int8", "bfloat16", "float32"),
    )
    threads: int | None = setting(None, "compute threads; default: the cores this process may use")

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads is {self.threads}; it must be at least 1")

    def require_packages(self) -> None:
        """Raises `ConfigError` where these settings need a package that is not installed."""
        if self.kernel_backend == "reference" or self.dtype in ("bfloat16", "float16"):
            require_torch()


def require_torch() -> None:
    if find_spec("torch") is None:
        raise ConfigError(
            "the reference kernels (--kernel-backend reference, --dtype bfloat16 or float16) need torch: "
            "pip install 'pelton[reference]'"
        )
