"""The admin API, /admin/v1: tenants, keys, usage. The middleware asks for the scope `admin` on all its paths."""

from __future__ import annotations

import re
import time
from typing import Any, cast

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from pelton.core.errors import ConfigError, InvalidRequestError
from pelton.serving.caller import TENANT_PATTERN
from pelton.serving.context import ServingContext
from pelton.serving.errors import HTTPProblemError, json_response
from pelton.serving.query import read_query
from pelton.serving.request_body import read_json_body
from pelton.serving.tenants.admin_types import (
    EngineTotals,
    KeyItem,
    KeyList,
    NewKeyRequest,
    RotateKeyRequest,
    TenantChanges,
    TenantItem,
    TenantList,
    UsageQuery,
    UsageReport,
    UsageRow,
)
from pelton.store.records import KeyRecord, TenantRecord

_GROUPINGS = {"tenant": "tenant_id", "key": "key_id", "hour": "hour_s"}


async def list_tenants(context: ServingContext, _: Request) -> Response:
    from pelton.store.access import AccessTables

    tenants = await AccessTables(await context.tenants.database()).list_tenants()
    return json_response(TenantList(data=[_tenant_item(context, tenant) for tenant in tenants]))


async def show_tenant(context: ServingContext, request: Request) -> Response:
    from pelton.store.access import AccessTables

    tenant_id = _tenant_id(request)
    for tenant in await AccessTables(await context.tenants.database()).list_tenants():
        if tenant.tenant_id == tenant_id:
            return json_response(_tenant_item(context, tenant))
    raise HTTPProblemError(404, f"there is no tenant {tenant_id}", code="tenant_not_found")


async def set_tenant(context: ServingContext, request: Request) -> Response:
    """Holds at once, for requests under way too where that makes sense: weights, caps, being disabled."""
    from pelton.store.access import AccessTables

    tenant_id = _tenant_id(request)
    body = await read_json_body(request, TenantChanges, context.config.max_body_bytes)
    changes = {name: value for name in body.__struct_fields__ if (value := getattr(body, name)) is not msgspec.UNSET}
    try:
        tenant = await AccessTables(await context.tenants.database()).set_tenant(tenant_id, changes)
    except ConfigError as error:
        raise InvalidRequestError(str(error)) from None
    await context.tenants.reload()
    return json_response(_tenant_item(context, tenant))


async def list_keys(context: ServingContext, _: Request) -> Response:
    """Oldest first, with those that have ended."""
    from pelton.store.access import AccessTables

    keys = await AccessTables(await context.tenants.database()).list_keys()
    return json_response(KeyList(data=[_key_item(key) for key in keys]))


async def create_key(context: ServingContext, request: Request) -> Response:
    from pelton.store.access import AccessTables

    body = await read_json_body(request, NewKeyRequest, context.config.max_body_bytes)
    expires_s = None if body.expires_in_s is None else time.time() + body.expires_in_s
    record, new = await AccessTables(await context.tenants.database()).create_key(
        body.tenant_id, name=body.name, scopes=body.scopes, expires_s=expires_s
    )
    await context.tenants.reload()
    return json_response(_key_item(record, new.text))


async def rotate_key(context: ServingContext, request: Request) -> Response:
    from pelton.store.access import AccessTables

    body = await read_json_body(request, RotateKeyRequest, context.config.max_body_bytes)
    key_id = request.path_params["key_id"]
    made = await AccessTables(await context.tenants.database()).rotate_key(key_id, grace_s=body.grace_s)
    if made is None:
        raise HTTPProblemError(404, f"there is no active key {key_id[:64]!r}", code="key_not_found")
    await context.tenants.reload()
    return json_response(_key_item(made[0], made[1].text))


async def revoke_key(context: ServingContext, request: Request) -> Response:
    """Its requests under way end with an error."""
    from pelton.store.access import AccessTables

    key_id = request.path_params["key_id"]
    record = await AccessTables(await context.tenants.database()).revoke_key(key_id)
    if record is None:
        raise HTTPProblemError(404, f"there is no key {key_id[:64]!r}", code="key_not_found")
    await context.tenants.reload()
    return json_response(_key_item(record))


async def show_usage(context: ServingContext, request: Request) -> Response:
    """By tenant and key, or as `group_by` says; up to this moment."""
    from pelton.store.usage import UsageTables

    query = read_query(request, UsageQuery)
    names = list(dict.fromkeys(query.group_by.split(",")))
    by = [_GROUPINGS[name] for name in names]
    await context.tenants.flush()
    tables = UsageTables(await context.tenants.database())
    tenant_id = None if query.tenant_id is msgspec.UNSET else query.tenant_id
    rows = [
        UsageRow(
            **cast("dict[str, Any]", dict(zip([name.replace("hour_s", "hour") for name in by], values, strict=True))),
            num_requests=used.num_requests,
            num_prompt_tokens=used.num_prompt_tokens,
            num_cached_tokens=used.num_cached_tokens,
            num_output_tokens=used.num_output_tokens,
        )
        for values, used in await tables.report(query.start_time, query.end_time, by=by, tenant_id=tenant_id)
    ]
    prompt, output = await tables.engine_totals()
    totals = EngineTotals(num_prompt_tokens=prompt, num_output_tokens=output)
    return json_response(UsageReport(data=rows, engine=totals))


def _tenant_id(request: Request) -> str:
    tenant_id: str = request.path_params["tenant_id"]
    if not re.fullmatch(TENANT_PATTERN, tenant_id):
        raise InvalidRequestError("a tenant's id is 1 to 128 letters, digits or ._:@-", param="tenant_id")
    return tenant_id


def _tenant_item(context: ServingContext, tenant: TenantRecord) -> TenantItem:
    names = [name for name in TenantItem.__struct_fields__ if name in TenantRecord.__slots__]
    return TenantItem(
        id=tenant.tenant_id,
        created=tenant.created_s,
        num_tokens_this_month=context.tenants.quotas.spent.get(tenant.tenant_id, 0),
        **{name: getattr(tenant, name) for name in names},
    )


def _key_item(key: KeyRecord, text: str | None = None) -> KeyItem:
    status = key.status(time.time())
    return KeyItem(
        id=key.key_id,
        tenant_id=key.tenant_id,
        name=key.name,
        scopes=sorted(key.scopes),
        status=cast("Any", status),
        created=key.created_s,
        expires=key.expires_s,
        revoked=key.revoked_s,
        key=msgspec.UNSET if text is None else text,
    )
