from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from pelton.build import PeltonConfig
from pelton.cli.settings import all_settings, resolve_settings
from pelton.core.errors import ConfigError


def write(folder: Path, text: str) -> Path:
    path = folder / "pelton.yaml"
    path.write_text(text)
    return path


def test_every_field_of_every_room_is_a_setting_with_help() -> None:
    settings = all_settings()
    default = PeltonConfig()
    for room in fields(PeltonConfig):
        for config_field in fields(getattr(default, room.name)):
            setting = settings[config_field.name]
            assert setting.room == room.name
            assert setting.help
            assert setting.default == getattr(getattr(default, room.name), config_field.name)


def test_nothing_given_is_the_default() -> None:
    assert resolve_settings({}, {}) == PeltonConfig()


def test_flags_win_over_environment_over_file(tmp_path: Path) -> None:
    path = write(tmp_path, "port: 1\nmax-num-seqs: 1\nthreads: 1\nhost: h")
    environment = {"PELTON_PORT": "2", "PELTON_MAX_NUM_SEQS": "2", "PELTON_HOST": "", "HOME": "/"}
    config = resolve_settings({"port": 3}, environment, path)
    assert (config.server.port, config.engine.max_num_seqs, config.worker.threads) == (3, 2, 1)
    assert config.server.host == "h"  # an empty variable is not set


def test_the_file_may_be_named_by_the_environment(tmp_path: Path) -> None:
    path = write(tmp_path, "model: m")
    assert resolve_settings({}, {"PELTON_CONFIG": str(path)}).model.model == "m"


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("port", "80", 80),
        ("request_timeout_s", "1.5", 1.5),
        ("enable_overlap", "off", False),
        ("enable_overlap", "True", True),
        ("served_model_name", "a, b", ("a", "b")),
        ("dtype", "bfloat16", "bfloat16"),
        ("kv_cache_memory_gb", "2", 2.0),
    ],
)
def test_environment_values(name: str, text: str, value: Any) -> None:
    config = resolve_settings({}, {f"PELTON_{name.upper()}": text})
    assert getattr(getattr(config, all_settings()[name].room), name) == value


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("request_timeout_s: 2", "request_timeout_s", 2.0),
        ("enable-overlap: false", "enable_overlap", False),
        ("served_model_name: [a, b]", "served_model_name", ("a", "b")),
        ("served_model_name: a", "served_model_name", ("a",)),
        ("threads: null", "threads", None),
        ("", "port", 8000),
    ],
)
def test_file_values(tmp_path: Path, text: str, name: str, value: Any) -> None:
    config = resolve_settings({}, {}, write(tmp_path, text))
    assert getattr(getattr(config, all_settings()[name].room), name) == value


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"PELTON_PROT": "1"}, "PELTON_PROT: there is no such setting; the nearest is PELTON_PORT"),
        ({"PELTON_ZZZZ": "1"}, "PELTON_ZZZZ: there is no such setting; `pelton serve --help` lists them all"),
        ({"PELTON_PORT": "eighty"}, "PELTON_PORT: 'eighty' is not a whole number"),
        ({"PELTON_PORT": "1.5"}, "PELTON_PORT: '1.5' is not a whole number"),
        ({"PELTON_REQUEST_TIMEOUT_S": "nan"}, "PELTON_REQUEST_TIMEOUT_S: 'nan' is not a number"),
        ({"PELTON_ENABLE_OVERLAP": "maybe"}, "PELTON_ENABLE_OVERLAP: 'maybe' is neither true nor false"),
        ({"PELTON_DTYPE": "int3"}, "PELTON_DTYPE: 'int3' is none of auto, float32, bfloat16, float16"),
        ({"PELTON_PIPELINE_PARALLEL_SIZE": "2"}, "PELTON_PIPELINE_PARALLEL_SIZE: Pelton does not have this yet; .*"),
        ({"PELTON_PORT": "70000"}, "port is 70000; it must be between 0 and 65535"),
    ],
)
def test_bad_environment(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}$"):
        resolve_settings({}, environment)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_num_seq: 3", "max_num_seq: there is no such setting; the nearest is max_num_seqs"),
        ("max-num-batched-token: 3", "the nearest is max_num_batched_tokens"),
        ("gpu-memory-utilization: 0.9", "Pelton does not have this yet; --kv-cache-memory-gb"),
        ("port: 1\nport: 2\nhost: [", "is not valid YAML"),
        ("max_num_seqs: 1\nmax-num-seqs: 2", "max-num-seqs: is there twice"),
        ("port: '80'", "port: '80' is not a whole number"),
        ("port: true", "port: True is not a whole number"),
        ("enable_overlap: 1", "enable_overlap: 1 is not true or false"),
        ("host: 1", "host: 1 is not text; put it in quotes"),
        ("served_model_name: [1]", "served_model_name: must be a list of texts"),
        ("dtype: int3", "dtype: 'int3' is none of"),
        ("drain_timeout_s: .inf", "drain_timeout_s: inf is not a number"),
        ("- port", "must hold one setting per line"),
        ("1: 2", "1: there is no such setting"),
    ],
)
def test_bad_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        resolve_settings({}, {}, write(tmp_path, text))
    assert message in str(raised.value)
    assert "pelton.yaml" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe", b"\x00"])
def test_unreadable_file(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        resolve_settings({}, {}, path)


def test_test_variables_are_let_through() -> None:
    assert resolve_settings({}, {"PELTON_TEST_MODEL": "x"}) == PeltonConfig()
