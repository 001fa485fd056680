"""API keys as text and as hashes.

A key is `plt_<key id>_<secret>`. The id finds the row and may be shown; the secret is 256 random bits, and only its
SHA-256 is stored. A slow hash (bcrypt, argon2) protects secrets that people choose, because those can be guessed;
2^256 cannot be searched however fast the hash is, while a slow one would cost every request its time.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from enum import StrEnum

KEY_PREFIX = "plt"


class Scope(StrEnum):
    """What a key opens."""

    INFERENCE = "inference"  # all that a client of a model needs
    METRICS = "metrics"  # /metrics, which shows every tenant
    ADMIN = "admin"  # /admin/v1 and /metrics


@dataclass(frozen=True, slots=True)
class NewKey:
    """`text` is for its owner and known nowhere else."""

    key_id: str
    text: str
    secret_hash: str


def make_key() -> NewKey:
    key_id, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
    return NewKey(key_id, f"{KEY_PREFIX}_{key_id}_{secret}", hash_secret(secret))


def hash_secret(secret: str) -> str:
    """64 hexadecimal digits."""
    return hashlib.sha256(secret.encode()).hexdigest()


def split_key(text: str) -> tuple[str, str]:
    """(key id, secret) of what a client sent; empty where it is not of this form."""
    prefix, _, rest = text.partition("_")
    key_id, _, secret = rest.partition("_")
    return (key_id, secret) if prefix == KEY_PREFIX else ("", "")


def is_secret(secret: str, secret_hash: str) -> bool:
    """In a time that tells nothing of where the two differ."""
    return hmac.compare_digest(hash_secret(secret), secret_hash)
