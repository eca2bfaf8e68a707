"""What can be typed after `outrider-agent`. Which module carries a command out is in its `module` default."""

from __future__ import annotations

import argparse
import importlib.metadata
from typing import Final, NoReturn

from edge_agent.commands.exits import Exit

PROGRAM = "outrider-agent"
CONFIG_FLAGS: Final = {"profile": "profile", "door": "door.path", "log_level": "log.level", "log_format": "log.format"}
"""Flags that set a configuration key."""


class Parser(argparse.ArgumentParser):
    """argparse with errors in the shape of all others."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the words that were typed, and end."""
        self.exit(Exit.USAGE, f"error: {message}\ncode: usage\ntry: {self.prog} --help\n")


def build_parser() -> Parser:
    """The whole command line."""
    common = _common()
    parser = Parser(
        prog=PROGRAM,
        parents=[common],
        description="The device's side of Outrider: runs signed models, keeps answering offline, syncs with one hub.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    parser.set_defaults(module=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def add(name: str, summary: str, *, module: str = "") -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = commands.add_parser(
            name, parents=[common], help=summary, description=summary, prog=f"{PROGRAM} {name}"
        )
        made.set_defaults(module=module or name)
        return made

    add("init", "make the state directory and a commented configuration file")
    enroll = add("enroll", "trade a join token for this device's identity")
    enroll.add_argument("token", metavar="TOKEN", help="the join token; - reads it from stdin, @FILE from a file")
    enroll.add_argument("--name", help="the name to ask for; the hub chooses one otherwise")
    enroll.add_argument("--force", action="store_true", help="replace the identity that this device has")
    _json(enroll)
    add("run", "run the agent in the foreground")
    _json(add("status", "how the running agent is"))
    _add_infer(add("infer", "ask a model about rows from files"))
    _add_queue(add("queue", "the records that wait for the hub"), common)
    _add_model(add("model", "the models on this device"), common)
    _json(add("doctor", "check this device and its links, and say what to do"))
    return parser


def _common() -> Parser:
    """Options that stand before or after the command; absent ones leave no trace, so that neither hides the other."""
    common = Parser(add_help=False, argument_default=argparse.SUPPRESS)
    group = common.add_argument_group("configuration")
    group.add_argument("--state", metavar="DIR", help="the agent's directory")
    group.add_argument("--config", metavar="FILE", help="configuration file, instead of DIR/agent.toml")
    group.add_argument("--profile", metavar="NAME", help="device profile, or auto")
    group.add_argument("--door", metavar="PATH", help="Unix socket of the agent")
    group.add_argument("--log-level", metavar="LEVEL", help="debug, info, warning or error")
    group.add_argument("--log-format", metavar="FORMAT", help="text or json")
    group.add_argument("--check-config", action="store_true", help="check the configuration and end")
    group.add_argument("--print-config", action="store_true", help="print every key, its value and its origin, and end")
    return common


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")


def _add_infer(infer: argparse.ArgumentParser) -> None:
    infer.add_argument("model", metavar="MODEL", help="the model's family")
    infer.add_argument("path", metavar="PATH", help="a .npy, .csv or .json file, or a folder of them")
    infer.add_argument("--input", metavar="NAME", help="the input that the rows are for, where the model has several")
    infer.add_argument("--batch", type=_positive, default=1, metavar="N", help="rows per request (1)")
    infer.add_argument("--deadline-ms", type=_positive, default=1000, metavar="MS", help="per request (1000)")
    infer.add_argument("--json", action="store_true", help="one JSON object per row on stdout")


def _add_queue(queue: argparse.ArgumentParser, common: Parser) -> None:
    actions = queue.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, summary in (
        ("ls", "what waits by class and for how long, what was lost, what it has cost the disk"),
        ("flush", "write what is held in memory, and try at once to reach the hub and send"),
        ("drop", "give up what waits of a class; the hub is told of the gap"),
    ):
        made = actions.add_parser(name, parents=[common], help=summary, description=summary)
        _json(made)
        if name == "drop":
            made.add_argument(
                "klass", metavar="CLASS", choices=["outcome", "result", "reading"], help="outcome, result or reading"
            )


def _add_model(model: argparse.ArgumentParser, common: Parser) -> None:
    actions = model.add_subparsers(dest="action", metavar="ACTION", required=True)
    _json(actions.add_parser("ls", parents=[common], help="models and what serves", description="models"))
    back = actions.add_parser(
        "rollback", parents=[common], help="go back to the release before", description="go back to the release before"
    )
    back.add_argument("family", metavar="MODEL", help="the model's family")
    _json(back)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _version() -> str:
    try:
        return importlib.metadata.version("outrider")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
