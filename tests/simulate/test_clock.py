import asyncio
import time

import pytest

from pelton.simulate.clock import SimulationError, VirtualClock, run_virtual


def test_a_day_passes_at_once_and_in_order() -> None:
    clock = VirtualClock()
    heard: list[tuple[str, float]] = []

    async def sleeper(name: str, delay_s: float) -> None:
        for _ in range(2):
            await asyncio.sleep(delay_s)
            heard.append((name, round(clock.now_s(), 6)))

    async def main() -> None:
        await asyncio.gather(sleeper("hour", 3600.0), sleeper("day", 86_400.0), sleeper("instant", 0.001))

    started_s = time.monotonic()
    run_virtual(main(), clock)
    assert heard == [
        ("instant", 0.001),
        ("instant", 0.002),
        ("hour", 3600.0),
        ("hour", 7200.0),
        ("day", 86_400.0),
        ("day", 172_800.0),
    ]
    assert time.monotonic() - started_s < 60


def test_waiting_for_nothing_is_an_error_not_a_hang() -> None:
    async def main() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(SimulationError, match="nothing more will happen"):
        run_virtual(main(), VirtualClock())


def test_timeouts_are_virtual() -> None:
    clock = VirtualClock()

    async def main() -> None:
        async with asyncio.timeout(1000):
            await asyncio.sleep(2000)

    with pytest.raises(TimeoutError):
        run_virtual(main(), clock)
    assert clock.now_s() == pytest.approx(1000)
