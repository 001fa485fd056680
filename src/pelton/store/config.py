"""Where things are kept that outlive the process. Imports no database."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from pelton.core.config import setting
from pelton.core.errors import ConfigError

DEFAULT_DATA_DIR = "~/.local/share/pelton"
DATABASE_FILE = "pelton.db"
_POSTGRES = ("postgresql://", "postgres://", "postgresql+asyncpg://")
_SQLITE = ("sqlite://", "sqlite+aiosqlite://")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreConfig:
    data_dir: str | None = setting(
        None,
        "folder of the database and the usage journal; default: $XDG_DATA_HOME/pelton, that is ~/.local/share/pelton",
    )
    database_url: str | None = setting(
        None, "postgresql://USER:PASSWORD@HOST/NAME, instead of a SQLite file in the data directory"
    )

    def __post_init__(self) -> None:
        if self.database_url is not None and not self.database_url.startswith((*_POSTGRES, *_SQLITE)):
            # The URL may hold a password: it is not repeated.
            raise ConfigError("database_url must start with postgresql:// or sqlite:///")

    @property
    def data_path(self) -> Path:
        return Path(self.data_dir or DEFAULT_DATA_DIR).expanduser().absolute()

    @property
    def sqlite_path(self) -> Path | None:
        """None: the database is another server's, or a SQLite file that was named by URL."""
        return self.data_path / DATABASE_FILE if self.database_url is None else None

    @property
    def url(self) -> str:
        """For SQLAlchemy, with the asynchronous driver."""
        if self.database_url is None:
            return f"sqlite+aiosqlite:///{quote(str(self.sqlite_path), safe='/')}"
        scheme, _, rest = self.database_url.partition("://")
        return f"{'sqlite+aiosqlite' if scheme.startswith('sqlite') else 'postgresql+asyncpg'}://{rest}"

    @property
    def has_database(self) -> bool:
        """Whether there may be something in it: a URL was given, or the file is there. Looks at the disk."""
        return self.database_url is not None or (self.sqlite_path is not None and self.sqlite_path.exists())
