"""Query parameters, as strict as bodies: an unknown or repeated one is refused."""

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request

from pelton.core.errors import InvalidRequestError

StructT = TypeVar("StructT", bound=msgspec.Struct)


def read_query(request: Request, struct: type[StructT]) -> StructT:
    """The query as a `struct`, whose fields are numbers, booleans and texts. Raises `InvalidRequestError`."""
    values: dict[str, Any] = {}
    for name, value in request.query_params.multi_items():
        if name in values:
            raise InvalidRequestError(f"{name[:64]} is there twice; send it once", param=name[:64])
        if name not in _fields(struct):
            raise InvalidRequestError(
                f"unknown parameter {name[:64]!r}; there are {', '.join(_fields(struct))}",
                param=name[:64],
                code="unknown_parameter",
            )
        values[name] = value
    try:
        return msgspec.convert(values, struct, strict=False)
    except msgspec.ValidationError as error:
        raise InvalidRequestError(f"the query is not usable: {error}") from None


@cache
def _fields(struct: type[msgspec.Struct]) -> tuple[str, ...]:
    return struct.__struct_encode_fields__


def query_parameters(struct: type[msgspec.Struct]) -> list[dict[str, Any]]:
    """For the OpenAPI document."""
    schema = msgspec.json.schema(struct)
    found = schema["$defs"][struct.__name__]["properties"]
    return [{"name": name, "in": "query", "schema": shape} for name, shape in found.items()]
