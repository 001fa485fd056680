"""Tenants, API keys, usage by the hour, folded journals."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "v1_tenants"
down_revision = None
branch_labels = ("tenants",)


def upgrade() -> None:
    op.create_table(
        "access_version",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("version", sa.BigInteger, nullable=False),
    )
    op.execute("INSERT INTO access_version (id, version) VALUES (1, 0)")
    op.create_table(
        "tenants",
        sa.Column("tenant_id", sa.String(128), primary_key=True),
        sa.Column("created_s", sa.Double, nullable=False),
        sa.Column("is_disabled", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("weight", sa.Double),
        sa.Column("max_num_running", sa.Integer),
        sa.Column("max_num_waiting", sa.Integer),
        sa.Column("max_kv_share", sa.Double),
        sa.Column("max_pin_share", sa.Double),
        sa.Column("requests_per_minute", sa.BigInteger),
        sa.Column("tokens_per_minute", sa.BigInteger),
        sa.Column("monthly_token_budget", sa.BigInteger),
        sa.Column("cache_group", sa.String(128)),
    )
    op.create_table(
        "api_keys",
        sa.Column("key_id", sa.String(32), primary_key=True),
        sa.Column("tenant_id", sa.String(128), nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("secret_hash", sa.String(64), nullable=False),
        sa.Column("scopes", sa.Text, nullable=False),
        sa.Column("created_s", sa.Double, nullable=False),
        sa.Column("expires_s", sa.Double),
        sa.Column("revoked_s", sa.Double),
    )
    op.create_index("ix_api_keys_tenant_id", "api_keys", ["tenant_id"])
    op.create_table(
        "usage_hours",
        sa.Column("hour_s", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("tenant_id", sa.String(128), primary_key=True),
        sa.Column("key_id", sa.String(32), primary_key=True),
        sa.Column("num_requests", sa.BigInteger, nullable=False),
        sa.Column("num_prompt_tokens", sa.BigInteger, nullable=False),
        sa.Column("num_cached_tokens", sa.BigInteger, nullable=False),
        sa.Column("num_output_tokens", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "folded_journals",
        sa.Column("journal_id", sa.String(64), primary_key=True),
        sa.Column("folded_s", sa.Double, nullable=False),
    )
    op.create_table(
        "engine_runs",
        sa.Column("run_id", sa.String(64), primary_key=True),
        sa.Column("updated_s", sa.Double, nullable=False),
        sa.Column("num_prompt_tokens", sa.BigInteger, nullable=False),
        sa.Column("num_output_tokens", sa.BigInteger, nullable=False),
    )
