"""Tables of tenants, keys and usage. Times are seconds since 1970."""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, Double, Integer, MetaData, String, Table, Text, false

metadata = MetaData(
    naming_convention={"pk": "pk_%(table_name)s", "ix": "ix_%(table_name)s_%(column_0_N_name)s"},
)

# One row; its number grows with every change to tenants or keys, so that servers see at once that there is one.
access_version = Table(
    "access_version",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("version", BigInteger, nullable=False),
)

# Null: no limit, or the server's own.
tenants = Table(
    "tenants",
    metadata,
    Column("tenant_id", String(128), primary_key=True),
    Column("created_s", Double, nullable=False),
    Column("is_disabled", Boolean, nullable=False, server_default=false()),
    Column("weight", Double),
    Column("max_num_running", Integer),
    Column("max_num_waiting", Integer),
    Column("max_kv_share", Double),
    Column("max_pin_share", Double),
    Column("requests_per_minute", BigInteger),
    Column("tokens_per_minute", BigInteger),
    Column("monthly_token_budget", BigInteger),
    Column("cache_group", String(128)),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("key_id", String(32), primary_key=True),
    Column("tenant_id", String(128), nullable=False, index=True),
    Column("name", Text, nullable=False),
    Column("secret_hash", String(64), nullable=False),
    Column("scopes", Text, nullable=False),  # separated by spaces
    Column("created_s", Double, nullable=False),
    Column("expires_s", Double),
    Column("revoked_s", Double),
)

# A row for each hour (UTC) in which a key was used; key_id is empty for requests without a key of ours.
usage_hours = Table(
    "usage_hours",
    metadata,
    Column("hour_s", BigInteger, primary_key=True, autoincrement=False),
    Column("tenant_id", String(128), primary_key=True),
    Column("key_id", String(32), primary_key=True),
    Column("num_requests", BigInteger, nullable=False),
    Column("num_prompt_tokens", BigInteger, nullable=False),
    Column("num_cached_tokens", BigInteger, nullable=False),
    Column("num_output_tokens", BigInteger, nullable=False),
)

# Journals whose content is in `usage_hours` but whose file may still be there: none is counted twice.
folded_journals = Table(
    "folded_journals",
    metadata,
    Column("journal_id", String(64), primary_key=True),
    Column("folded_s", Double, nullable=False),
)

# The token counters of every engine that a server has had, as it told them last: usage adds up to their sum.
engine_runs = Table(
    "engine_runs",
    metadata,
    Column("run_id", String(64), primary_key=True),
    Column("updated_s", Double, nullable=False),
    Column("num_prompt_tokens", BigInteger, nullable=False),
    Column("num_output_tokens", BigInteger, nullable=False),
)
