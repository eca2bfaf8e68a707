"""`outrider-hub migrate`: bring the database to this version's schema. Not while a hub runs on it."""

from __future__ import annotations

import argparse
from contextlib import closing

from cloud_hub.commands import settings
from cloud_hub.ground import migrate
from cloud_hub.ground.database import Database


def run(arguments: argparse.Namespace) -> int:
    """Apply what is missing, all or nothing."""
    config = settings.load(arguments).config
    config.require()
    with config.folder.alone(), closing(Database(config.database_url)) as database:
        before, after = migrate.upgrade(database)
    print(f"the database is at {after}" if before == after else f"the database went from {before} to {after}")
    return 0
