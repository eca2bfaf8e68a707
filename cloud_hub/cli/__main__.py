"""Entry of `outrider`: parse, run the one module that the command needs, end with its exit code."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Sequence

from cloud_hub.cli.arguments import PACKAGE, build


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (cloud_hub/cli/exits.py)."""
    parser = build()
    parsed = parser.parse_args(arguments)
    if parsed.show_version:
        return _version()
    run: str | None = getattr(parsed, "run", None)
    if run is None:
        parser.print_help()
        return 2
    from cloud_hub.cli import screen
    from cloud_hub.cli.exits import Exit, exit_of
    from shared.errors import OutriderError

    module, function = run.split(":")
    try:
        code: Exit = getattr(importlib.import_module(f"{PACKAGE}.{module}"), function)(parsed)
        sys.stdout.flush()
        return code
    except OutriderError as error:
        screen.show_error(error)
        return exit_of(error)
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has seen enough. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _version() -> int:
    from importlib.metadata import version

    print(f"outrider {version('outrider')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
