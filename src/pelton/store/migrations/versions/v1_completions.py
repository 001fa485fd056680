"""Stored chat completions."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "v1_completions"
down_revision = None
branch_labels = ("completions",)


def upgrade() -> None:
    op.create_table(
        "chat_completions",
        sa.Column("completion_id", sa.String(64), primary_key=True),
        sa.Column("tenant_id", sa.String(128), nullable=False),
        sa.Column("created_s", sa.Double, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("labels", sa.Text, nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.Column("messages", sa.LargeBinary, nullable=False),
    )
    op.create_index("ix_chat_completions_created_s", "chat_completions", ["created_s"])
    op.create_index("ix_chat_completions_tenant_id_created_s", "chat_completions", ["tenant_id", "created_s"])
