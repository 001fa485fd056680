"""What a helper may take: the processor's time is counted, not what it waits for."""

from __future__ import annotations

import pytest

from pelton.serving.helper_process import HelperLimitError, HelperPool, HelperSpec


def test_only_the_processors_time_is_limited() -> None:
    spec = HelperSpec(
        module="tests.serving.sleepy_helper",
        setup=bytes,
        work="sleeping",
        time_limit_s=0.3,
        memory_limit_bytes=1 << 30,
        num_processes=1,
        start_limit_s=10.0,
    )
    pool = HelperPool(spec)
    try:
        assert pool.call(b"sleep") == b"sleep"
        with pytest.raises(HelperLimitError):
            pool.call(b"compute")
        assert pool.call(b"again") == b"again"  # by a new one
    finally:
        pool.close()
