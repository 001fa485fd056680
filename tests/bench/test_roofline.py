import pytest

from pelton.bench.roofline import Ceiling, Ceilings, KernelBenchPlan, KernelWork, make_figure
from pelton.core.errors import ConfigError

DRAM = Ceiling(name="dram", one_thread=10e9, all_threads=20e9)
L2 = Ceiling(name="l2", one_thread=100e9, all_threads=200e9)
INT8 = Ceiling(name="int8", one_thread=500e9, all_threads=1000e9)
INT4 = Ceiling(name="int4", one_thread=600e9, all_threads=1100e9)


def ceilings(*more: Ceiling, l3_bytes: int = 0) -> Ceilings:
    return Ceilings(
        num_threads=2, dram_bytes=1 << 28, l2_bytes=1000, l3_bytes=l3_bytes, ceilings=(DRAM, L2, INT8, INT4, *more)
    )


def work(num_ops: float, num_bytes: float, arithmetic: Ceiling | None = INT8) -> KernelWork:
    return KernelWork(
        kernel="qkv", detail="", num_rows=1, num_ops=num_ops, num_bytes=num_bytes, memory=DRAM, arithmetic=arithmetic
    )


@pytest.mark.parametrize(
    ("case", "time_s", "binding", "share"),
    [
        (work(1e9, 200e6), 0.02, DRAM, 0.5),  # 1 ms of operations, 10 ms of bytes
        (work(100e9, 200e6), 0.4, INT8, 0.25),  # 100 ms, 10 ms
        (work(100e9, 200e6, None), 0.01, DRAM, 1.0),
    ],
)
def test_the_slower_of_two_ceilings_binds(case: KernelWork, time_s: float, binding: Ceiling, share: float) -> None:
    figure = make_figure(case, [9.0, time_s, time_s / 2, time_s * 2])  # the first call warms up
    assert figure.time_s == time_s
    assert figure.num_calls == 3
    assert figure.binding is binding
    assert figure.share == pytest.approx(share)
    assert figure.ops_per_s == pytest.approx(case.num_ops / time_s)
    assert figure.bytes_per_s == pytest.approx(case.num_bytes / time_s)


def test_the_best_of_those_that_this_machine_has() -> None:
    assert ceilings().best(("int8", "int4", "amx")) is INT4
    with pytest.raises(KeyError, match="amx"):
        ceilings().best(("amx",))


@pytest.mark.parametrize(
    ("num_bytes", "l3_bytes", "name"), [(2000, 0, "l2"), (2001, 0, "dram"), (2001, 8000, "l3"), (4001, 8000, "dram")]
)
def test_nearest_memory(num_bytes: int, l3_bytes: int, name: str) -> None:
    l3 = Ceiling(name="l3", one_thread=30e9, all_threads=60e9)
    assert ceilings(l3, l3_bytes=l3_bytes).memory_of(num_bytes).name == name


@pytest.mark.parametrize("values", [{"rows": ()}, {"contexts": (0,)}, {"decode_requests": (-1, 4)}])
def test_sizes_must_be_positive(values: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        KernelBenchPlan(**values)  # type: ignore[arg-type]
