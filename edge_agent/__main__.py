"""Entry of `outrider-agent`: parse, read the configuration, run the one module that the command needs.

Nothing heavy is imported here: the daemon's memory starts with this file.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (edge_agent/commands/exits.py)."""
    foreign = foreign_shared(importlib.import_module("shared"))
    if foreign:
        print(
            f"error: 'shared' was imported from {foreign}, not from beside this program\ncode: config.shadowed\n"
            "try: start in another directory, or with PYTHONSAFEPATH=1",
            file=sys.stderr,
        )
        return 78
    from edge_agent.commands import screen
    from edge_agent.commands.exits import Exit, exit_of
    from shared.errors import OutriderError

    try:
        return _dispatch(sys.argv[1:] if argv is None else argv)
    except OutriderError as error:
        screen.show_error(error)
        return exit_of(error)
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone; point stdout elsewhere so that the interpreter's last flush is quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.FAILED


def foreign_shared(shared: ModuleType) -> str:
    """Where `shared` came from if that is not beside this package; a folder in the working directory can shadow it."""
    found = Path(shared.__file__).resolve().parent if shared.__file__ else None
    wanted = Path(__file__).resolve().parent.parent / "shared"
    return "" if found == wanted else str(found or shared.__path__)


def _dispatch(argv: Sequence[str]) -> int:
    from edge_agent.commands import screen
    from edge_agent.commands.exits import Exit
    from edge_agent.commands.parser import CONFIG_FLAGS, build_parser
    from edge_agent.config import load_config

    parser = build_parser()
    args = parser.parse_args(argv)
    flags = {key: getattr(args, name) for name, key in CONFIG_FLAGS.items() if hasattr(args, name)}
    loaded = load_config(state_dir=getattr(args, "state", None), file=getattr(args, "config", None), flags=flags)
    if getattr(args, "print_config", False):
        screen.show("\n".join(f"{item.key} = {item.shown()}  # {item.origin}" for item in loaded.settings))
        return Exit.DONE
    if getattr(args, "check_config", False):
        from edge_agent.profiles import AUTO, choose_profile

        if loaded.config.profile != AUTO:  # what auto comes to depends on the machine, not on the configuration
            choose_profile(loaded.config.profile)
        screen.note("the configuration is good")
        return Exit.DONE
    if args.module is None:
        parser.print_help(sys.stderr)
        return Exit.USAGE
    command = importlib.import_module(f"edge_agent.commands.{args.module}")
    code: int = command.run(args, loaded)
    return code


if __name__ == "__main__":
    sys.exit(main())
