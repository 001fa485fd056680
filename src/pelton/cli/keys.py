"""`pelton keys`: API keys, in the database itself. A server that runs takes changes over; none need run."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from pelton.cli.database import (
    ConfigFlag,
    DataDirFlag,
    JsonFlag,
    UrlFlag,
    format_time,
    parse_duration_s,
    with_database,
)
from pelton.core.api_key import NewKey, Scope
from pelton.core.errors import ConfigError
from pelton.core.request import DEFAULT_TENANT

if TYPE_CHECKING:
    from pelton.store.database import Database
    from pelton.store.records import KeyRecord, TenantRecord

app = App(name="keys", help="Make, list, rotate and revoke API keys; set what tenants may use.")
KeyArgument = Annotated[str, Parameter(help="the key's id, the part between the underscores; not the key itself")]


@app.command
def create(
    *,
    tenant: Annotated[str, Parameter(help="who owns it; made where there is none of that name")] = DEFAULT_TENANT,
    name: Annotated[str, Parameter(help="what it is for, for your records")] = "",
    scope: Annotated[tuple[Scope, ...], Parameter(help="what it opens; may be given several times")] = (
        Scope.INFERENCE,
    ),
    expires: Annotated[str | None, Parameter(help="after how long it ends: 12h, 30d; default: never")] = None,
    data_dir: DataDirFlag = None,
    database_url: UrlFlag = None,
    config: ConfigFlag = None,
    as_json: JsonFlag = False,
) -> int:
    """Make a key and print it, this once."""
    from pelton.store.access import AccessTables

    _check_tenant_name(tenant)
    expires_s = None if expires is None else time.time() + parse_duration_s(expires)

    async def make(database: Database) -> tuple[KeyRecord, NewKey]:
        return await AccessTables(database).create_key(tenant, name=name, scopes=scope, expires_s=expires_s)

    _show_new(*with_database(make, data_dir, database_url, config), as_json=as_json)
    return 0


@app.command(name="list")
def list_keys(
    *,
    tenant: Annotated[str | None, Parameter(help="this tenant's only")] = None,
    data_dir: DataDirFlag = None,
    database_url: UrlFlag = None,
    config: ConfigFlag = None,
    as_json: JsonFlag = False,
) -> int:
    """List keys, without their secrets, which nobody knows."""
    from pelton.store.access import AccessTables

    async def ask(database: Database) -> list[KeyRecord]:
        return await AccessTables(database).list_keys(tenant)

    keys = with_database(ask, data_dir, database_url, config)
    if as_json:
        print(json.dumps([_as_json(key) for key in keys], indent=1))
        return 0
    from rich import box
    from rich.table import Table

    from pelton.cli.tables import print_table

    table = Table("id", "tenant", "name", "scopes", "status", "created (UTC)", "expires (UTC)", box=box.SIMPLE_HEAD)
    now_s = time.time()
    for key in keys:
        scopes, times = ", ".join(sorted(key.scopes)), (format_time(key.created_s), format_time(key.expires_s))
        table.add_row(key.key_id, key.tenant_id, key.name, scopes, key.status(now_s), *times)
    print_table(table)
    return 0


@app.command
def revoke(
    key: KeyArgument, *, data_dir: DataDirFlag = None, database_url: UrlFlag = None, config: ConfigFlag = None
) -> int:
    """End a key. A running server ends its requests, streams included, within half a second."""
    from pelton.store.access import AccessTables

    async def end(database: Database) -> KeyRecord | None:
        return await AccessTables(database).revoke_key(key_id_of(key))

    if with_database(end, data_dir, database_url, config) is None:
        raise ConfigError(f"there is no key {key_id_of(key)}; `pelton keys list` shows them")
    print(f"revoked {key_id_of(key)}")
    return 0


@app.command
def rotate(
    key: KeyArgument,
    *,
    grace: Annotated[str, Parameter(help="how long the old key still works: 1h, 2d")] = "0s",
    data_dir: DataDirFlag = None,
    database_url: UrlFlag = None,
    config: ConfigFlag = None,
    as_json: JsonFlag = False,
) -> int:
    """Make a new key on the terms of an old one, which ends."""
    from pelton.store.access import AccessTables

    grace_s = parse_duration_s(grace)

    async def make(database: Database) -> tuple[KeyRecord, NewKey] | None:
        return await AccessTables(database).rotate_key(key_id_of(key), grace_s=grace_s)

    made = with_database(make, data_dir, database_url, config)
    if made is None:
        raise ConfigError(f"there is no active key {key_id_of(key)}; `pelton keys list` shows them")
    _show_new(*made, as_json=as_json)
    return 0


@app.command
def limits(
    tenant: Annotated[str | None, Parameter(help="whose; default: show those of all")] = None,
    /,
    *changes: Annotated[str, Parameter(help="NAME=VALUE, as in `requests_per_minute=60`; `none` takes one away")],
    data_dir: DataDirFlag = None,
    database_url: UrlFlag = None,
    config: ConfigFlag = None,
    as_json: JsonFlag = False,
) -> int:
    """Show or set what a tenant may use: weight, rates, budget, caps. A running server takes it over at once."""
    from pelton.store.access import AccessTables

    values = _parse_changes(changes)
    if tenant is not None:
        _check_tenant_name(tenant)

    async def run(database: Database) -> list[TenantRecord]:
        tables = AccessTables(database)
        if tenant is not None and values:
            return [await tables.set_tenant(tenant, values)]
        known = await tables.list_tenants()
        return known if tenant is None else [record for record in known if record.tenant_id == tenant]

    records = with_database(run, data_dir, database_url, config)
    if tenant is not None and not records:
        raise ConfigError(f"there is no tenant {tenant}; it is made with its first key or limit")
    _show_limits(records, as_json=as_json)
    return 0


def _parse_changes(changes: Sequence[str]) -> dict[str, Any]:
    """As the admin API takes them, from text. Raises `ConfigError`."""
    import msgspec

    from pelton.core.errors import InvalidRequestError
    from pelton.serving.request_body import invalid_field
    from pelton.serving.tenants.admin_types import TenantChanges

    texts: dict[str, str | None] = {}
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals or not name or not value:
            raise ConfigError(f"{change!r} is no limit; write NAME=VALUE, as in requests_per_minute=60")
        texts[name.strip().replace("-", "_")] = None if value == "none" else value
    try:
        found = msgspec.convert(texts, TenantChanges, strict=False)
    except msgspec.ValidationError as error:
        problem: InvalidRequestError = invalid_field(str(error), TenantChanges)
        raise ConfigError(str(problem)) from None
    return {name: getattr(found, name) for name in texts}


def _show_limits(records: Sequence[TenantRecord], *, as_json: bool) -> None:
    from pelton.store.access import TENANT_FIELDS

    if as_json:
        found = [{"tenant_id": r.tenant_id} | {name: getattr(r, name) for name in TENANT_FIELDS} for r in records]
        print(json.dumps(found, indent=1))
        return
    from rich import box
    from rich.table import Table

    from pelton.cli.tables import format_figure, print_table

    table = Table(
        "tenant", *(name.removeprefix("is_").replace("_", " ") for name in TENANT_FIELDS), box=box.SIMPLE_HEAD
    )
    for record in records:
        values = (getattr(record, name) for name in TENANT_FIELDS)
        shown = [
            ("yes" if value else "") if isinstance(value, bool)
            else value if isinstance(value, str)
            else "" if value is None
            else format_figure(value)
            for value in values
        ]  # fmt: skip
        table.add_row(record.tenant_id, *shown)
    print_table(table)


def _check_tenant_name(tenant: str) -> None:
    import re

    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,127}", tenant):
        raise ConfigError(f"tenant: {tenant!r} must be 1 to 128 letters, digits or ._:@- and start with one")


def key_id_of(text: str) -> str:
    """Somebody may paste the whole key."""
    from pelton.core.api_key import split_key

    return split_key(text)[0] or text


def _show_new(record: KeyRecord, new: NewKey, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(_as_json(record) | {"key": new.text}, indent=1))
        return
    print(new.text)
    from sys import stderr

    print(f"Key {record.key_id} of tenant {record.tenant_id}. It is not stored and cannot be shown again.", file=stderr)


def _as_json(key: KeyRecord) -> dict[str, Any]:
    return {
        "id": key.key_id,
        "tenant_id": key.tenant_id,
        "name": key.name,
        "scopes": sorted(key.scopes),
        "status": key.status(time.time()),
        "created": key.created_s,
        "expires": key.expires_s,
        "revoked": key.revoked_s,
    }
