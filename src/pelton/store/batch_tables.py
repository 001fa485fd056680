"""Tables of files and batches. Times are seconds since 1970; contents lie on disk, in the data directory `place`."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Double, String, Table, Text

from pelton.store.tables import metadata

files = Table(
    "files",
    metadata,
    Column("file_id", String(64), primary_key=True),
    Column("tenant_id", String(128), nullable=False, index=True),
    Column("place", String(64), nullable=False),
    Column("created_s", Double, nullable=False),
    Column("expires_s", Double),
    Column("filename", Text, nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("num_bytes", BigInteger, nullable=False),
)

batches = Table(
    "batches",
    metadata,
    Column("batch_id", String(64), primary_key=True),
    Column("tenant_id", String(128), nullable=False, index=True),
    Column("place", String(64), nullable=False),
    Column("created_s", Double, nullable=False),
    Column("status", String(32), nullable=False, index=True),
    Column("input_file_id", String(64), nullable=False),
    Column("document", Text, nullable=False),  # the rest, as JSON
)
