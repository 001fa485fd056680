"""Flags, environment and file, resolved once into a `PeltonConfig`.

Every setting is a field of a room's config dataclass. `max_num_seqs` is `--max-num-seqs` on the
command line, `PELTON_MAX_NUM_SEQS` in the environment and `max_num_seqs` (or `max-num-seqs`) in a
YAML file; a flag wins over the environment, which wins over the file.
"""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from pelton.build import PeltonConfig
from pelton.cli.vllm_flags import missing_flag_hint
from pelton.core.config import setting_help
from pelton.core.errors import ConfigError

ENV_PREFIX = "PELTON_"
# Variables that are no setting: the file to read, the server that chat and bench talk to.
OTHER_ENV_NAMES = ("PELTON_CONFIG", "PELTON_BASE_URL")
TEST_ENV_PREFIX = "PELTON_TEST_"

_TRUE = ("1", "true", "yes", "on")
_FALSE = ("0", "false", "no", "off")


@dataclass(frozen=True, slots=True)
class Setting:
    """One field of one room. `value_type` is int, float, bool, str or tuple (of strings)."""

    room: str
    name: str
    value_type: type
    default: Any
    help: str
    choices: tuple[str, ...]
    aliases: tuple[str, ...]

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def env_name(self) -> str:
        return ENV_PREFIX + self.name.upper()


def all_settings() -> dict[str, Setting]:
    """Every setting by field name, in the order of the rooms in `PeltonConfig`."""
    found: dict[str, Setting] = {}
    for room, config_class in _room_classes().items():
        hints = get_type_hints(config_class)
        for config_field in fields(config_class):
            if config_field.name in found:
                raise TypeError(f"{config_field.name} is a setting of two rooms")
            found[config_field.name] = _make_setting(room, config_field, hints[config_field.name])
    return found


def _room_classes() -> dict[str, Any]:
    hints = get_type_hints(PeltonConfig)
    return {config_field.name: hints[config_field.name] for config_field in fields(PeltonConfig)}


def _make_setting(room: str, config_field: Field[Any], hint: Any) -> Setting:
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = (arg for arg in get_args(hint) if arg is not type(None))
    value_type = get_origin(hint) or hint
    if value_type not in (int, float, bool, str, tuple):
        raise TypeError(f"{config_field.name}: a setting cannot be of type {hint}")
    alias = config_field.metadata.get("alias", ())
    return Setting(
        room=room,
        name=config_field.name,
        value_type=value_type,
        default=config_field.default,
        help=setting_help(config_field),
        choices=tuple(config_field.metadata.get("choices", ())),
        aliases=(alias,) if isinstance(alias, str) else tuple(alias),
    )


def resolve_settings(
    flags: Mapping[str, Any], environment: Mapping[str, str], file: Path | None = None
) -> PeltonConfig:
    """`flags` holds only what was given, already parsed. Raises `ConfigError` naming source and nearest name."""
    settings = all_settings()
    env_values = read_environment(settings, environment)
    file = file or (Path(environment["PELTON_CONFIG"]) if environment.get("PELTON_CONFIG") else None)
    file_values = read_file(settings, file) if file else {}
    values = {**file_values, **env_values, **flags}
    if "data_dir" not in values and environment.get("XDG_DATA_HOME", "").startswith("/"):
        values["data_dir"] = str(Path(environment["XDG_DATA_HOME"]) / "pelton")
    rooms = {
        room: config_class(**{name: value for name, value in values.items() if settings[name].room == room})
        for room, config_class in _room_classes().items()
    }
    return PeltonConfig(**rooms)


def read_environment(settings: Mapping[str, Setting], environment: Mapping[str, str]) -> dict[str, Any]:
    """Values of the `PELTON_*` variables. An empty one counts as not set."""
    by_env_name = {setting.env_name: setting for setting in settings.values()}
    values: dict[str, Any] = {}
    for env_name, text in sorted(environment.items()):
        if not env_name.startswith(ENV_PREFIX) or env_name.startswith(TEST_ENV_PREFIX) or env_name in OTHER_ENV_NAMES:
            continue
        if env_name not in by_env_name:
            name = env_name.removeprefix(ENV_PREFIX).lower()
            raise ConfigError(unknown_name_message(env_name, name, (*by_env_name, *OTHER_ENV_NAMES)))
        if text:
            setting = by_env_name[env_name]
            values[setting.name] = _parse(parse_text, setting, text, env_name)
    return values


def read_file(settings: Mapping[str, Setting], path: Path) -> dict[str, Any]:
    """Values of a YAML file: one mapping, a key per setting."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold one setting per line, such as `port: 8000`")
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        where = f"{path}: {key}"
        if name not in settings:
            raise ConfigError(unknown_name_message(where, name, settings))
        if name in values:
            raise ConfigError(f"{where}: is there twice")
        if value is not None:
            values[name] = _parse(parse_value, settings[name], value, where)
    return values


def _parse(parse: Callable[[Setting, Any], Any], setting: Setting, value: Any, where: str) -> Any:
    try:
        return parse(setting, value)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def unknown_name_message(shown: str, name: str, known: Iterable[str]) -> str:
    """For a key, variable or flag that nobody knows: vLLM's that Pelton lacks, or the nearest known one."""
    hint = missing_flag_hint(name)
    if hint is not None:
        return f"{shown}: {hint}"
    candidates = {_bare(candidate): candidate for candidate in known}
    nearest = difflib.get_close_matches(_bare(name), candidates, n=1, cutoff=0.6)
    if nearest:
        return f"{shown}: there is no such setting; the nearest is {candidates[nearest[0]]}"
    return f"{shown}: there is no such setting; `pelton serve --help` lists them all"


def _bare(name: str) -> str:
    return name.lower().removeprefix(ENV_PREFIX.lower()).replace("-", "_")


def parse_text(setting: Setting, text: str) -> Any:
    """A value written as text, in a flag or a variable; lists are separated by commas. Raises `ValueError`."""
    text = text.strip()
    if setting.value_type is tuple:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if setting.value_type is bool:
        if text.lower() not in (*_TRUE, *_FALSE):
            raise ValueError(f"{text!r} is neither true nor false")
        return text.lower() in _TRUE
    if setting.value_type is int:
        return _parse_number(int, text, f"{text!r} is not a whole number")
    if setting.value_type is float:
        return _parse_number(float, text, f"{text!r} is not a number")
    return _check_choice(setting, text)


def _parse_number(number_type: type[int] | type[float], text: str, problem: str) -> int | float:
    try:
        number = number_type(text)
    except ValueError:
        raise ValueError(problem) from None
    if not math.isfinite(number):
        raise ValueError(problem)
    return number


def parse_value(setting: Setting, value: Any) -> Any:
    """A value as YAML typed it. Raises `ValueError`."""
    if setting.value_type is tuple:
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, str) for item in items):
            raise ValueError("must be a list of texts")
        return tuple(items)
    if setting.value_type is bool and isinstance(value, bool):
        return value
    if setting.value_type is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if setting.value_type is float and isinstance(value, int | float) and not isinstance(value, bool):
        return _parse_number(float, str(value), f"{value!r} is not a number")
    if setting.value_type is str and isinstance(value, str):
        return _check_choice(setting, value)
    wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "text; put it in quotes"}
    raise ValueError(f"{value!r} is not {wanted[setting.value_type]}")


def _check_choice(setting: Setting, value: str) -> str:
    if setting.choices and value not in setting.choices:
        raise ValueError(f"{value!r} is none of {', '.join(setting.choices)}")
    return value
