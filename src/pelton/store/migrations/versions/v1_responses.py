"""Stored responses."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "v1_responses"
down_revision = None
branch_labels = ("responses",)


def upgrade() -> None:
    op.create_table(
        "responses",
        sa.Column("response_id", sa.String(64), primary_key=True),
        sa.Column("tenant_id", sa.String(128), nullable=False),
        sa.Column("created_s", sa.Double, nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.Column("input", sa.LargeBinary, nullable=False),
        sa.Column("previous_response_id", sa.String(512)),
        sa.Column("is_running", sa.Boolean, nullable=False),
        sa.Column("server_id", sa.String(300), nullable=False),
        sa.Column("lease_until_s", sa.Double, nullable=False),
        sa.Column("events", sa.LargeBinary),
    )
    op.create_index("ix_responses_created_s", "responses", ["created_s"])
    op.create_index("ix_responses_tenant_id_created_s", "responses", ["tenant_id", "created_s"])
