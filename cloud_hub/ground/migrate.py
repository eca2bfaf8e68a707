"""Brings the database to this version's schema. The only importer of Alembic outside `migrations/`."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.engine import Connection

from cloud_hub.ground.database import Database, lift_deadlines
from shared.errors import ConfigError


def head() -> str:
    """The revision that this version of the hub works with."""
    revision = ScriptDirectory.from_config(_config()).get_current_head()
    assert revision is not None, "the migrations are part of the package"
    return revision


def current(conn: Connection) -> str | None:
    """The revision that the database is at; None for an empty one."""
    return MigrationContext.configure(conn).get_current_revision()


def upgrade(database: Database) -> tuple[str | None, str]:
    """Apply what is missing, all in one transaction; returns the revision before and after."""

    def work(conn: Connection) -> tuple[str | None, str]:
        before = current(conn)
        lift_deadlines(conn)
        config = _config()
        config.attributes["connection"] = conn
        command.upgrade(config, "head")
        after = current(conn)
        assert after is not None
        return before, after

    return database.write_now(work)


def require_current(database: Database) -> None:
    """Raise ConfigError unless the database is at this version's revision."""
    at, wanted = database.read_now(current), head()
    if at != wanted:
        raise ConfigError(
            f"the database is at revision {at or 'none'}, this version needs {wanted}",
            code="config.database_revision",
            hint="stop the hub, make a copy of hub.db, then run `outrider-hub migrate`",
        )


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config
