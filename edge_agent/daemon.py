"""Entry of the daemon's process: `python -I -m edge_agent.daemon LAUNCH`, started by `outrider-agent run`."""

from __future__ import annotations

import asyncio
import sys

from shared.errors import OutriderError


def main() -> int:
    """Run until told to stop; returns the exit code."""
    # msgspec prefers typing_extensions wherever another package happens to have brought it, for names that typing
    # has; for a device that is 0.4 MB too much. None makes that import fail, which msgspec provides for.
    sys.modules["typing_extensions"] = None  # type: ignore[assignment]
    # shutil, which comes with urllib, loads both for archives that nobody here makes, and provides for their absence.
    sys.modules["bz2"] = sys.modules["lzma"] = None  # type: ignore[assignment]
    from edge_agent.logs import configure_logging
    from edge_agent.main import run
    from edge_agent.settings import decode_launch

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
        return 130


def _first_cause(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _end(error: OutriderError) -> int:
    from edge_agent.commands import screen
    from edge_agent.commands.exits import exit_of

    screen.show_error(error)
    return exit_of(error)


if __name__ == "__main__":
    sys.exit(main())
