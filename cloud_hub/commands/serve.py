"""`outrider-hub serve`: run the hub until it is told to stop."""

from __future__ import annotations

import argparse
import logging
import sys

from cloud_hub import config
from cloud_hub.commands import settings


def run(arguments: argparse.Namespace) -> int:
    """Check or print the configuration, or serve; the readiness line goes to standard output."""
    loaded = settings.load(arguments)
    if arguments.print_config:
        print(config.describe(loaded))
        return 0
    if arguments.check_config:
        print("the configuration is good")
        return 0
    logging.basicConfig(
        level=loaded.config.log.level.upper(),
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    # They tell each start and connection; what they have to say at warning is enough.
    for name in ("uvicorn", "uvicorn.error", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    from cloud_hub import main

    return main.run(
        loaded.config,
        announce=lambda line: print(line, flush=True),
        manager=config.notify_socket(config.environment()),
    )
