"""Entry of the daemon's process: `python -I -m edge_agent.daemon LAUNCH`, started by `outrider-agent run`."""

from __future__ import annotations

import asyncio
import sys

from edge_agent.commands import screen
from edge_agent.commands.exits import Exit, exit_of
from edge_agent.logs import configure_logging
from edge_agent.main import run
from edge_agent.settings import decode_launch
from shared.errors import OutriderError


def main() -> int:
    """Run until told to stop; returns the exit code."""
    try:
        launch = decode_launch(sys.argv[1] if len(sys.argv) == 2 else "")
        configure_logging(launch.config.log)
        return asyncio.run(run(launch))
    except OutriderError as error:
        return _end(error)
    except BaseExceptionGroup as group:
        cause = _first_cause(group)
        if not isinstance(cause, OutriderError):
            raise  # a defect: its trace is worth more than a polite line
        return _end(cause)
    except KeyboardInterrupt:
        return Exit.INTERRUPTED


def _first_cause(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _end(error: OutriderError) -> int:
    screen.show_error(error)
    return exit_of(error)


if __name__ == "__main__":
    sys.exit(main())
