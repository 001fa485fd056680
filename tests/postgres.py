"""A real PostgreSQL server in a temporary folder; it refuses to run as root, so there it runs as nobody."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path

_numbers = count()


class Postgres:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def new_database(self) -> str:
        """The URL of an empty database."""
        name = f"pelton{next(_numbers)}"
        _run("createdb", "-h", str(self._folder), "-U", "pelton", name)
        return f"postgresql://pelton@/{name}?host={self._folder}"


@contextlib.contextmanager
def running_postgres() -> Iterator[Postgres]:
    """Fails, with the reason, where PostgreSQL is not installed."""
    missing = [name for name in ("initdb", "pg_ctl", "postgres", "createdb") if shutil.which(name) is None]
    assert not missing, (
        f"these tests need PostgreSQL, and {', '.join(missing)} is not on PATH; on Debian: apt-get install postgresql, "
        "and add /usr/lib/postgresql/*/bin to PATH"
    )
    folder = Path(tempfile.mkdtemp(prefix="pelton-postgres-"))
    if os.geteuid() == 0:
        nobody = pwd.getpwnam("nobody")
        os.chown(folder, nobody.pw_uid, nobody.pw_gid)
    data = folder / "data"
    try:
        _run("initdb", "-D", str(data), "-U", "pelton", "-A", "trust", "--no-sync", "-E", "UTF8", "--locale=C")
        options = f"-k {folder} -c listen_addresses='' -c fsync=off"
        _run("pg_ctl", "-D", str(data), "-l", str(folder / "log"), "-w", "-o", options, "start")
        try:
            yield Postgres(folder)
        finally:
            _run("pg_ctl", "-D", str(data), "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(*command: str) -> None:
    user = "nobody" if os.geteuid() == 0 else None
    # Not through pipes: the server that pg_ctl starts would keep them open.
    with tempfile.TemporaryFile() as output:
        done = subprocess.run(command, user=user, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd="/")
        output.seek(0)
        assert done.returncode == 0, f"{command[0]} failed: {output.read().decode(errors='replace')}"
