import pytest

from pelton.cli.pull import show_progress
from pelton.weights.catalog.progress import PullPhase, PullProgress


def test_a_log_gets_a_line_for_each_phase_source_and_quarter(capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress() as report:
        report(PullProgress("m", PullPhase.CONNECTING, "a mirror"))
        for num_bytes in range(0, 1001, 5):
            report(PullProgress("m", PullPhase.DOWNLOADING, "a mirror", num_bytes, 1000))
        report(PullProgress("m", PullPhase.DOWNLOADING, "another", 0, None))  # the first mirror failed
        report(PullProgress("m", PullPhase.DONE))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "m: connecting from a mirror",
        "m: downloading 0% from a mirror",
        "m: downloading 25% from a mirror",
        "m: downloading 50% from a mirror",
        "m: downloading 75% from a mirror",
        "m: downloading 100% from a mirror",
        "m: downloading from another",
        "m: done",
    ]
