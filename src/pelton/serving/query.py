"""Query parameters, as strict as bodies: an unknown or repeated one is refused."""

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request

from pelton.core.errors import InvalidRequestError
from pelton.serving.request_body import invalid_field

StructT = TypeVar("StructT", bound=msgspec.Struct)


class NoQuery(msgspec.Struct, kw_only=True):
    """Of routes that take none."""


def read_query(
    request: Request, struct: type[StructT], unsupported: tuple[str, ...] = (), maps: tuple[str, ...] = ()
) -> StructT:
    """The query as a `struct`, whose fields are numbers, booleans and texts. Raises `InvalidRequestError`.

    `unsupported` are names that OpenAI defines and Pelton does not; its clients write lists as `name[]`.
    `maps` are fields that are written as `name[key]=value`.
    """
    values: dict[str, Any] = {}
    for name, value in request.query_params.multi_items():
        if name.removesuffix("[]") in unsupported:
            name = name.removesuffix("[]")
            raise InvalidRequestError(f"{name} is not supported here", param=name, code="unsupported_parameter")
        field, _, key = name.partition("[")
        if field in maps and key.endswith("]"):
            pairs, key = values.setdefault(field, {}), key[:-1]
            if not key or "[" in key or "]" in key:
                problem = f"{name[:64]} is not {field}[KEY]: KEY is not empty and has no brackets"
                raise InvalidRequestError(problem, param=name[:64])
            if key in pairs:
                raise InvalidRequestError(f"{name[:64]} is there twice; send it once", param=name[:64])
            pairs[key] = value
            continue
        if name in values:
            raise InvalidRequestError(f"{name[:64]} is there twice; send it once", param=name[:64])
        if name not in _fields(struct):
            raise InvalidRequestError(
                f"unknown parameter {name[:64]!r}; there are {', '.join(_fields(struct)) or 'none in the query here'}",
                param=name[:64],
                code="unknown_parameter",
            )
        values[name] = value
    try:
        return msgspec.convert(values, struct, strict=False)
    except msgspec.ValidationError as error:
        raise invalid_field(str(error), struct, "query") from None


@cache
def _fields(struct: type[msgspec.Struct]) -> tuple[str, ...]:
    return struct.__struct_encode_fields__


def query_parameters(struct: type[msgspec.Struct]) -> list[dict[str, Any]]:
    """For the OpenAPI document."""
    schema = msgspec.json.schema(struct)
    found = schema["$defs"][struct.__name__]["properties"]
    return [{"name": name, "in": "query", "schema": shape, **_style(shape)} for name, shape in found.items()]


def _style(shape: dict[str, Any]) -> dict[str, Any]:
    return {"style": "deepObject", "explode": True} if shape.get("type") == "object" else {}
