import re

import pytest

from pelton.cli.settings import all_settings
from pelton.cli.vllm_flags import _MISSING, missing_flag_hint


def test_no_hint_hides_a_setting_and_every_flag_it_names_exists() -> None:
    settings = all_settings()
    assert not set(_MISSING) & set(settings)
    named = {flag for hint in _MISSING.values() for flag in re.findall(r"--[a-z-]+", hint)}
    assert named
    assert named <= {setting.flag for setting in settings.values()}


@pytest.mark.parametrize(
    ("name", "is_known"),
    [
        ("--gpu-memory-utilization", True),
        ("gpu_memory_utilization", True),
        ("--gpu-memory-utilization=0.9", True),
        ("-tp", False),
        ("-pp=2", True),
        ("--no-enable-chunked-prefill", True),
        ("--kv-transfer-config", True),
        ("--max-num-seqs", False),
        ("--nonsense", False),
    ],
)
def test_missing_flag_hint(name: str, is_known: bool) -> None:
    assert (missing_flag_hint(name) is not None) == is_known
