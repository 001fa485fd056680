"""Command-line flags made from the settings, grouped by room."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from cyclopts import Group, Parameter, Token

from pelton.cli.settings import Setting, all_settings, parse_text

MODEL_ARGUMENT = "model"


def with_settings(rooms: Sequence[str]) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Give a command `(*, own flags, **settings)` one flag for every setting of `rooms`.

    The command receives only the settings that were given on the command line. `model` may also be
    given as the first plain argument.
    """

    def decorate(command: Callable[..., int]) -> Callable[..., int]:
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD]
        settings = [setting for setting in all_settings().values() if setting.room in rooms]
        groups = {room: Group(f"{room.title()} settings", sort_key=index + 1) for index, room in enumerate(rooms)}
        parameters = [_make_parameter(setting, groups[setting.room]) for setting in settings]
        model = [p for p in parameters if p.name == MODEL_ARGUMENT]
        flags = [p for p in parameters if p.name != MODEL_ARGUMENT]

        @functools.wraps(command)
        def run(*arguments: Any, **given: Any) -> int:
            return command(**dict(zip([MODEL_ARGUMENT], arguments, strict=False)), **given)

        run.__signature__ = inspect.Signature([*model, *own, *flags])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in (*model, *own, *flags)}
        return run

    return decorate


def _make_parameter(setting: Setting, group: Group) -> inspect.Parameter:
    parameter = Parameter(
        help=setting.help,
        group=group,
        alias=setting.aliases or None,
        converter=_make_converter(setting) if setting.value_type in (int, float) else None,
        consume_multiple=True if setting.value_type is tuple else None,
        negative=() if setting.value_type is tuple else None,
        show_default=None if setting.default not in (None, ()) else False,
    )
    value_type: Any = setting.value_type
    if setting.choices:
        value_type = Literal[setting.choices]
    elif setting.value_type is tuple:
        value_type = tuple[str, ...]
    if setting.default is None:
        value_type = value_type | None
    is_model = setting.name == MODEL_ARGUMENT
    return inspect.Parameter(
        setting.name,
        inspect.Parameter.POSITIONAL_OR_KEYWORD if is_model else inspect.Parameter.KEYWORD_ONLY,
        default=setting.default,
        annotation=Annotated[value_type, parameter],
    )


def _make_converter(setting: Setting) -> Callable[[Any, Sequence[Token]], Any]:
    # cyclopts would round 1.5 to a whole number.
    def convert(_type: Any, tokens: Sequence[Token]) -> Any:
        return parse_text(setting, tokens[0].value)

    return convert
