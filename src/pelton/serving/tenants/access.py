"""`AccessControl`: who a request is from, by its key."""

from __future__ import annotations

import hmac
import time
from dataclasses import dataclass

from starlette.datastructures import Headers

from pelton.core.api_key import Scope, hash_secret, is_secret, split_key
from pelton.core.errors import ServiceUnavailableError
from pelton.serving.errors import HTTPProblemError
from pelton.serving.tenants.problems import disabled_tenant, invalid_key, missing_scope
from pelton.store.records import Access, KeyRecord, TenantRecord

ADMIN_PREFIX = "/admin/"
# An unknown key id is compared too, so that the time does not tell which ids there are.
_NO_HASH = hash_secret("")


@dataclass(frozen=True, slots=True)
class Identity:
    """`tenant_id` is None where the client may say itself which tenant it is."""

    tenant_id: str | None = None
    key_id: str = ""
    scopes: frozenset[Scope] = frozenset()


# They read the server's own files, or take away what others use: tenants with keys of their own may not.
_ADAPTER_PATHS = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
_MODEL_PATH = "/v1/models/"  # DELETE unloads an adapter
ANYBODY = Identity(scopes=frozenset({Scope.INFERENCE, Scope.METRICS}))


class AccessControl:
    """`api_key` and `admin_key` are those of the command line; `set` brings those of the database.

    Without any key all but the admin API is open. Once there has been a key, also one that is revoked now,
    a key is asked for.
    """

    def __init__(self, api_key: str | None, admin_key: str | None) -> None:
        self._static = [
            (key.encode(), identity)
            for key, identity in (
                (api_key, ANYBODY),
                (admin_key, Identity(scopes=frozenset({Scope.ADMIN, Scope.METRICS}))),
            )
            if key is not None
        ]
        self._has_api_key = api_key is not None
        self._access = Access(0, {}, {})
        self.is_loading = False  # there is a database, and it has not been read yet: nobody comes in

    def set(self, access: Access) -> None:
        self._access = access
        self.is_loading = False

    @property
    def access(self) -> Access:
        return self._access

    @property
    def needs_key(self) -> bool:
        return self._has_api_key or bool(self._access.keys)

    def tenant(self, tenant_id: str) -> TenantRecord | None:
        return self._access.tenants.get(tenant_id)

    def identify(self, headers: Headers, path: str, method: str) -> Identity:
        """Raises `HTTPProblemError` (401, 403), or `ServiceUnavailableError` while the keys are being read."""
        changes_adapters = path in _ADAPTER_PATHS or (method == "DELETE" and path.startswith(_MODEL_PATH))
        scope = Scope.ADMIN if changes_adapters and self._access.keys else _scope_of(path)
        key = _sent_key(headers)
        identity = self._match(key) if key else None
        if identity is None:
            if self.is_loading:
                raise ServiceUnavailableError("the server is starting; try again later", retry_after_s=1.0)
            if self.needs_key or scope is Scope.ADMIN:
                raise invalid_key()
            return ANYBODY
        if scope not in identity.scopes and not (scope is Scope.METRICS and Scope.ADMIN in identity.scopes):
            raise missing_scope(scope)
        return identity

    def _match(self, key: str) -> Identity | None:
        sent = key.encode("latin-1")  # as the bytes came
        found = None
        for static, identity in self._static:
            if hmac.compare_digest(sent, static):
                found = identity
        key_id, secret = split_key(key)
        record = self._access.keys.get(key_id)
        is_right = is_secret(secret, record.secret_hash if record is not None else _NO_HASH)
        if record is None or not is_right:
            return found
        problem = self.problem_of(record)
        if problem is not None:
            raise problem
        return Identity(record.tenant_id, record.key_id, record.scopes)

    def problem_of(self, record: KeyRecord) -> HTTPProblemError | None:
        """Why a key that is known opens nothing (any more)."""
        if not record.is_valid(time.time()):
            return invalid_key()
        tenant = self.tenant(record.tenant_id)
        return disabled_tenant(record.tenant_id) if tenant is not None and tenant.is_disabled else None


def _scope_of(path: str) -> Scope:
    if path.startswith(ADMIN_PREFIX):
        return Scope.ADMIN
    return Scope.METRICS if path == "/metrics" else Scope.INFERENCE


def _sent_key(headers: Headers) -> str:
    """As OpenAI's clients send it, or as Anthropic's do."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return headers.get("x-api-key", "").strip()
