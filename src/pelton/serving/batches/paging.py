"""Query parameters of lists: `after`, `limit`, `order`."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.requests import Request

from pelton.core.errors import InvalidRequestError


def query_of(request: Request, names: Sequence[str]) -> dict[str, str]:
    """Raises `InvalidRequestError` for one that is unknown or there twice."""
    found: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name not in names:
            expected = f"; there are {', '.join(names)}" if names else ""
            raise InvalidRequestError(
                f"unknown query parameter {name[:64]!r}{expected}", param=name[:64], code="unknown_parameter"
            )
        if name in found:
            raise InvalidRequestError(f"{name} is there twice", param=name)
        found[name] = value
    return found


def limit_of(query: dict[str, str], *, default: int, most: int) -> int:
    text = query.get("limit")
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 9 and 1 <= int(text) <= most):
        raise InvalidRequestError(f"limit is {text[:20]!r}; it must be a number from 1 to {most}", param="limit")
    return int(text)


def is_newest_first(query: dict[str, str]) -> bool:
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise InvalidRequestError(f"order is {order[:20]!r}; it must be 'asc' or 'desc'", param="order")
    return order == "desc"
