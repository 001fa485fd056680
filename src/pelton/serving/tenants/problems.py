"""What a caller is told whose key, scope or limit does not allow a request."""

from __future__ import annotations

from pelton.core.api_key import Scope
from pelton.serving.errors import HTTPProblemError


class LimitError(HTTPProblemError):
    """429 of a tenant's own limits. `kind` is OpenAI's `type`."""

    def __init__(self, message: str, *, code: str, kind: str, retry_after_s: float, headers: dict[str, str]) -> None:
        if code == "insufficient_quota":
            # The openai client would send it again on its own, and again for nothing.
            headers = {**headers, "x-should-retry": "false"}
        super().__init__(429, message, code=code, headers=headers)
        self.kind = kind
        self.retry_after_s = retry_after_s


def invalid_key() -> HTTPProblemError:
    """The same for a key that is missing, unknown, revoked or expired."""
    return HTTPProblemError(
        401,
        "a valid API key is required, as the header 'Authorization: Bearer KEY' or 'x-api-key: KEY'",
        code="invalid_api_key",
        headers={"www-authenticate": "Bearer"},
    )


def ended_key() -> HTTPProblemError:
    return HTTPProblemError(401, "the API key was revoked or has expired", code="invalid_api_key")


def missing_scope(scope: Scope) -> HTTPProblemError:
    return HTTPProblemError(403, f"this API key has not the scope {scope}", code="insufficient_permissions")


def disabled_tenant(tenant_id: str) -> HTTPProblemError:
    return HTTPProblemError(403, f"tenant {tenant_id} is disabled", code="tenant_disabled")
