"""The rows of the admin API in the table of routes (`serving/routes.py`)."""

from __future__ import annotations

from pelton.serving.route import Route
from pelton.serving.tenants import admin, admin_types

_ERRORS = (400, 401, 403, 404, 500, 503)
_BODY_ERRORS = (*_ERRORS, 408, 413, 415)

ADMIN_ROUTES: tuple[Route, ...] = (
    Route(
        is_admin=True,
        method="GET",
        path="/admin/v1/tenants",
        handler=admin.list_tenants,
        summary="The tenants and their limits",
        answer=admin_types.TenantList,
        errors=_ERRORS,
    ),
    Route(
        is_admin=True,
        method="GET",
        path="/admin/v1/tenants/{tenant_id}",
        handler=admin.show_tenant,
        summary="One tenant",
        answer=admin_types.TenantItem,
        errors=_ERRORS,
    ),
    Route(
        is_admin=True,
        method="PATCH",
        path="/admin/v1/tenants/{tenant_id}",
        handler=admin.set_tenant,
        summary="Make a tenant, or change its limits",
        body=admin_types.TenantChanges,
        answer=admin_types.TenantItem,
        errors=_BODY_ERRORS,
    ),
    Route(
        is_admin=True,
        method="GET",
        path="/admin/v1/keys",
        handler=admin.list_keys,
        summary="The API keys, without their secrets",
        answer=admin_types.KeyList,
        errors=_ERRORS,
    ),
    Route(
        is_admin=True,
        method="POST",
        path="/admin/v1/keys",
        handler=admin.create_key,
        summary="Make an API key; only this answer shows it",
        body=admin_types.NewKeyRequest,
        answer=admin_types.KeyItem,
        errors=_BODY_ERRORS,
    ),
    Route(
        is_admin=True,
        method="DELETE",
        path="/admin/v1/keys/{key_id}",
        handler=admin.revoke_key,
        summary="Revoke an API key",
        answer=admin_types.KeyItem,
        errors=_ERRORS,
    ),
    Route(
        is_admin=True,
        method="POST",
        path="/admin/v1/keys/{key_id}/rotate",
        handler=admin.rotate_key,
        summary="Make a key on the terms of an old one, which ends",
        body=admin_types.RotateKeyRequest,
        answer=admin_types.KeyItem,
        errors=_BODY_ERRORS,
    ),
    Route(
        is_admin=True,
        method="GET",
        path="/admin/v1/usage",
        handler=admin.show_usage,
        summary="Tokens used, by tenant, key or hour",
        answer=admin_types.UsageReport,
        errors=_ERRORS,
        query=admin_types.UsageQuery,
    ),
)
