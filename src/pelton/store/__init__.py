"""What must outlive the process, in SQLite or PostgreSQL: tenants, API keys, usage; other rooms' tables too.

Imports core only. SQLAlchemy and alembic take a third of a second to import, so every module here but `config.py` is
imported within the function that needs it, never at a server's start: a server without keys, stored responses or
batches has no database.

How to add a table:

1. Define it in a module of its own in this folder, on `tables.metadata`:
   `responses = Table("responses", metadata, Column("response_id", String(64), primary_key=True), ...)`.
   Times are seconds since 1970 (`Double`), JSON is `LargeBinary` or `Text`; nothing of one dialect alone. Name the
   owner in a column `tenant_id`, and put it into the `where` of every statement.
2. Write `migrations/versions/<name>.py` by hand, as `v1_tenants.py` is: `revision = "v1_responses"`,
   `down_revision = None`, `branch_labels = ("responses",)` and `upgrade()`. Each capability is a branch of its own (all
   heads are applied), so files made side by side never conflict; the next one of a branch names its predecessor.
3. Queries stand beside the table as functions or a small class over `Database`:
   `async with database.begin() as connection: await connection.execute(...)` writes, and `database.read()` reads.
   `tests/store/test_migrations.py` compares every module's tables with what the migrations make, on both databases;
   add the module to its list.
4. Get a `Database` by `await context.store.database()` in a handler (one for the process, opened and migrated at first
   use), or `open_database(config)` elsewhere.
"""
