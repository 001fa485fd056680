"""The OpenAPI document, made from the structs that the server decodes and encodes with."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from pelton.serving.caller import ID_PATTERN, TENANT_PATTERN
from pelton.serving.openai.requests import ContentPart
from pelton.serving.openai.responses_api.items import InputItem
from pelton.serving.openai.responses_api.requests import ResponseTool
from pelton.serving.query import query_parameters
from pelton.serving.route import Route

_PATH_PARAMETER = re.compile(r"\{(\w+)(?::\w+)?\}")
_ERROR_TEXTS = {
    400: "The request is not valid",
    401: "The API key is missing or wrong",
    403: "The API key does not allow this",
    404: "There is none of that name",
    408: "The deadline passed",
    409: "It is in use, or has ended",
    413: "The body is too large",
    415: "The body is not JSON",
    429: "The tenant has too much waiting, or the deadline cannot be met; see Retry-After",
    500: "The engine failed on this request",
    503: "The server is starting, restarting, draining or full; see Retry-After",
}
_HEADERS = (
    ("X-Tenant-Id", TENANT_PATTERN, "Who shares KV and fair service; `default` without it."),
    ("X-Session-Id", ID_PATTERN, "The conversation that this is a turn of; found by its prefix without it."),
    ("X-Program-Id", ID_PATTERN, "The agent run that the session belongs to."),
)
# Of /v1/completions: one of three forms. The struct takes mixtures of them, which the handler refuses.
_TOKEN_IDS = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}}
_TEXT = {"type": "string", "minLength": 1}
_PROMPT = {
    "anyOf": [
        _TEXT,
        _TOKEN_IDS,
        {"type": "array", "minItems": 1, "items": {"anyOf": [_TEXT, _TOKEN_IDS]}},
    ]
}


def build_openapi(routes: tuple[Route, ...], version: str, *, has_key: bool) -> dict[str, Any]:
    structs: dict[str, type[msgspec.Struct]] = {}
    for route in routes:
        structs.update(
            (kind.__name__, kind) for kind in (route.body, route.answer, route.item, route.chunk, route.error) if kind
        )
    structs.update((kind.__name__, kind) for kind in (InputItem, ContentPart, ResponseTool))
    _, schemas = msgspec.json.schema_components(structs.values(), ref_template="#/components/schemas/{name}")
    schemas["CompletionRequest"]["properties"]["prompt"] = _PROMPT
    schemas["EmbeddingRequest"]["properties"]["input"] = {"anyOf": [*_PROMPT["anyOf"], {"type": "null"}]}
    _name_items(schemas)
    components: dict[str, Any] = {"schemas": schemas}
    components["securitySchemes"] = {"ApiKey": {"type": "http", "scheme": "bearer"}}
    paths: dict[str, Any] = {}
    for route in routes:
        path = _PATH_PARAMETER.sub(r"{\1}", route.path)
        paths.setdefault(path, {})[route.method.lower()] = _operation(route, has_key=has_key)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Pelton", "version": version},
        "paths": paths,
        "components": components,
    }


def _name_items(schema: Any) -> None:
    """Of lists that are decoded one by one (`listed`), for which msgspec knows no items."""
    if isinstance(schema, dict):
        if "x-items" in schema:
            schema["items"] = {"$ref": f"#/components/schemas/{schema.pop('x-items')}"}
        for inner in schema.values():
            _name_items(inner)
    elif isinstance(schema, list):
        for inner in schema:
            _name_items(inner)


def _operation(route: Route, *, has_key: bool) -> dict[str, Any]:
    operation: dict[str, Any] = {"summary": route.summary, "operationId": route.handler.__name__ + _suffix(route)}
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in _PATH_PARAMETER.findall(route.path)
    ]
    if route.query is not None:
        parameters += query_parameters(route.query)
    parameters += [
        {"name": name, "in": "header", "description": text, "schema": {"type": "string", "pattern": f"^{pattern}$"}}
        for name, pattern, text in (_HEADERS if route.body is not None and route.chunk is not None else _HEADERS[:1])
        if route.has_tenant
    ]
    if parameters:
        operation["parameters"] = parameters
    if route.body is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": _schema(route.body)}}
    if route.form is not None:
        operation["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": route.form}}}
    content: dict[str, Any] = {route.media_type: {"schema": {"type": "string"}}}
    if route.answer is not None:
        content = {"application/json": _schema(route.answer)}
    if route.answer is not None and route.item is not None:
        items = {"type": "array", "items": _schema(route.item)["schema"]}
        content = {"application/json": {"schema": {"anyOf": [_schema(route.answer)["schema"], items]}}}
    if route.chunk is not None:
        # The schema is that of one event.
        description = f"{route.chunk.__name__} as JSON, or an {route.error.__name__}; the last event tells of the end"
        event = {
            "type": "object",
            "required": ["data"],
            "properties": {"data": {"type": "string", "description": description}},
        }
        content["text/event-stream"] = {"schema": event}
    operation["responses"] = {"200": {"description": "Success", "content": content}}
    for status in route.errors:
        if status in (401, 403) and not (has_key or route.is_admin):
            continue
        operation["responses"][str(status)] = {
            "description": _ERROR_TEXTS[status],
            "content": {"application/json": _schema(route.error)},
        }
    if (has_key or route.is_admin) and not route.is_open:
        operation["security"] = [{"ApiKey": []}]
    return operation


def _suffix(route: Route) -> str:
    return {"/health": "_health", "/score": "_root", "/rerank": "_root", "/v2/rerank": "_v2"}.get(route.path, "")


def _schema(struct: type[msgspec.Struct]) -> dict[str, Any]:
    return {"schema": {"$ref": f"#/components/schemas/{struct.__name__}"}}
