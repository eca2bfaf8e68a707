"""Entry of `outrider-hub`: parse, run the one module that the command needs, end with its exit code."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from cloud_hub.commands.arguments import PACKAGE, build


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
    from cloud_hub.ground.refusals import NotAllowed, NotFound
    from shared.errors import OutriderError

    module, function = run.split(":")
    try:
        code: int = getattr(importlib.import_module(f"{PACKAGE}.{module}"), function)(parsed)
        sys.stdout.flush()
        return code
    except OutriderError as error:
        screen.show_error(error)
        if isinstance(error, NotFound):
            return Exit.NOT_FOUND
        return Exit.NOT_ALLOWED if isinstance(error, NotAllowed) else exit_of(error)
    except KeyboardInterrupt:
        return Exit.INTERRUPTED


def _version() -> int:
    from importlib.metadata import version

    print(f"outrider-hub {version('outrider')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
