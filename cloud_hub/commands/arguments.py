"""The tree of commands and their options. Imports nothing heavy, so that `--help` is instant."""

from __future__ import annotations

import argparse
import re
from typing import Final

from cloud_hub.cli.arguments import Parser

PACKAGE: Final = "cloud_hub.commands"
_UNITS_S: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def build() -> Parser:
    """The parser; each leaf sets `run` to `module:function` below `cloud_hub.commands`."""
    parser = Parser(prog="outrider-hub", description="The hub of a fleet: enrolment, signed releases, telemetry.")
    parser.add_argument("--version", action="store_true", dest="show_version", help="print the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _init(commands)
    serve = _leaf(commands, "serve", "run the hub", run="serve:run")
    _overrides(serve)
    serve.add_argument("--check-config", action="store_true", help="check the configuration and exit")
    serve.add_argument("--print-config", action="store_true", help="print every key, its value and its origin")
    _leaf(commands, "migrate", "bring the database to this version", run="migrate:run")
    _token(commands)
    _keys(commands)
    authority = commands.add_parser("ca", help="the hub's certificate authority")
    inner = authority.add_subparsers(title="commands", metavar="COMMAND", required=True)
    show = _leaf(inner, "show", "print the CA's fingerprint and file", run="authority:show")
    show.add_argument("--pem", action="store_true", help="print the certificate itself")
    show.add_argument("--json", action="store_true", help="print one JSON document")
    rotate = _leaf(inner, "rotate", "change the CA, step by step", run="authority:rotate")
    rotate.add_argument(
        "step", choices=("begin", "switch", "finish"), help="make the next CA; let it issue; forget the old one"
    )
    rotate.add_argument("--force", action="store_true", help="also while devices are not ready; they are listed")
    rotate.add_argument("--json", action="store_true", help="print one JSON document")
    doctor = _leaf(commands, "doctor", "check what the hub stands on, and say what to do", run="doctor:run")
    doctor.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def duration_s(text: str) -> int:
    """`90s`, `15m`, `24h`, `30d` in seconds."""
    match = re.fullmatch(r"([1-9][0-9]{0,8})([smhd])", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a duration such as 15m, 24h or 30d")
    return int(match.group(1)) * _UNITS_S[match.group(2)]


def _init(commands: argparse._SubParsersAction[Parser]) -> None:
    leaf = _leaf(commands, "init", "make a hub: CA, keys, database, first operator token", run="init:run")
    keys = leaf.add_mutually_exclusive_group(required=True)
    keys.add_argument("--offline", metavar="DIR", help="new directory for the offline signing keys; move it away")
    keys.add_argument("--root", metavar="DRAFT", help="a first root that its holders have signed (`keys init`)")
    leaf.add_argument("--online", metavar="DIR", help="with --root: where `keys init --online` made the hub's own keys")
    leaf.add_argument(
        "--name", action="append", default=[], dest="names", metavar="HOST", help="host name or address; repeatable"
    )
    leaf.add_argument("--host", metavar="ADDRESS", help="address to listen on (default 127.0.0.1)")
    leaf.add_argument("--port", type=int, metavar="PORT", help="HTTPS port (default 8443)")
    leaf.add_argument("--broker-port", type=int, metavar="PORT", help="MQTT port (default 8883)")
    leaf.add_argument("--token-file", metavar="FILE", help="also write the operator token to this new file (0600)")
    leaf.add_argument("--json", action="store_true", help="print one JSON document")


def _token(commands: argparse._SubParsersAction[Parser]) -> None:
    token = commands.add_parser("token", help="join tokens for devices, API tokens for people and programs")
    inner = token.add_subparsers(title="commands", metavar="COMMAND", required=True)
    leaf = _leaf(inner, "create", "make a token; its text is shown once", run="tokens:create")
    leaf.add_argument("--kind", required=True, choices=("join", "api"), help="what it is for")
    leaf.add_argument("--name", default="", help="a name for people")
    leaf.add_argument(
        "--role", choices=("viewer", "operator", "release_manager", "admin"), help="API: what it may do (viewer)"
    )
    leaf.add_argument("--device", metavar="NAME", help="join: the only device name that it gives")
    leaf.add_argument("--profile", metavar="NAME", help="join: the profile that the device gets")
    leaf.add_argument("--uses", type=int, metavar="N", help="join: how many devices it admits (1)")
    leaf.add_argument("--ttl", type=duration_s, metavar="TIME", help="how long it lives: 15m, 24h, 30d")
    leaf.add_argument("--json", action="store_true", help="print one JSON document")


def _keys(commands: argparse._SubParsersAction[Parser]) -> None:
    keys = commands.add_parser("keys", help="signing keys: make them, change them, sign in turn")
    inner = keys.add_subparsers(title="commands", metavar="COMMAND", required=True)
    # No --data: these three work on any machine.
    leaf = _plain(inner, "init", "make keys here (--out), or put the first root together (--draft)", run="keys:init")
    what = leaf.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", metavar="DIR", help="make keys in this directory")
    what.add_argument("--draft", metavar="FILE", help="put the first root together, in this new file")
    leaf.add_argument(
        "--role",
        action="append",
        default=[],
        choices=("root", "targets", "release"),
        help="make such a key; repeatable",
    )
    leaf.add_argument("--online", action="store_true", help="make the keys that a new hub signs with by itself")
    leaf.add_argument("--count", type=int, choices=range(1, 9), default=1, metavar="N", help="keys per role (1)")
    leaf.add_argument("--public", action="append", default=[], metavar="FILE|DIR", help="public halves; repeatable")
    _threshold(leaf)
    leaf = _plain(inner, "sign", "add your signatures to a draft", run="keys:sign")
    leaf.add_argument("draft", metavar="DRAFT")
    leaf.add_argument("--keys", required=True, metavar="DIR", help="the directory with your keys")
    leaf.add_argument("--yes", action="store_true", help="sign without asking")
    leaf = _plain(inner, "show", "show a draft and whose signatures are missing, or a public half", run="keys:show")
    leaf.add_argument("file", metavar="DRAFT|PUB.json")
    leaf = _leaf(inner, "rotate", "draft a change of keys, thresholds or expiry", run="rotation:rotate")
    leaf.add_argument(
        "roles", nargs="+", metavar="ROLE", help="root, targets, models/FAMILY, learned/FAMILY, or one of the hub's own"
    )
    leaf.add_argument("--draft", required=True, metavar="FILE", help="the new file")
    leaf.add_argument("--add", action="append", default=[], metavar="FILE|DIR", help="public halves; repeatable")
    leaf.add_argument("--withdraw", action="store_true", help="of learned/FAMILY: let the hub sign none any more")
    leaf.add_argument("--remove", action="append", default=[], metavar="KEYID", help="a key's first digits; repeatable")
    _threshold(leaf)
    leaf.add_argument("--json", action="store_true", help="print one JSON document")
    leaf = _leaf(inner, "publish", "make a signed draft take effect on this hub", run="rotation:publish")
    leaf.add_argument("draft", metavar="DRAFT")
    leaf.add_argument("--json", action="store_true", help="print one JSON document")


def _threshold(leaf: Parser) -> None:
    leaf.add_argument(
        "--threshold", action="append", default=[], metavar="ROLE=N", help="so many signatures are needed; repeatable"
    )


def _plain(commands: argparse._SubParsersAction[Parser], name: str, summary: str, *, run: str) -> Parser:
    leaf: Parser = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    leaf.set_defaults(run=run)
    leaf.add_argument("--json", action="store_true", help="print one JSON document")
    return leaf


def _leaf(commands: argparse._SubParsersAction[Parser], name: str, summary: str, *, run: str) -> Parser:
    leaf: Parser = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    leaf.set_defaults(run=run)
    leaf.add_argument("--data", metavar="DIR", help="the hub's data directory (OUTRIDER_HUB_DATA_DIR)")
    return leaf


def _overrides(leaf: Parser) -> None:
    leaf.add_argument("--host", metavar="ADDRESS", help="listen.host")
    leaf.add_argument("--port", type=int, metavar="PORT", help="listen.port")
    leaf.add_argument("--broker-host", metavar="ADDRESS", help="broker.host")
    leaf.add_argument("--broker-port", type=int, metavar="PORT", help="broker.port")
    leaf.add_argument("--broker-mode", choices=("managed", "external"), help="broker.mode")
    leaf.add_argument("--log-level", choices=("debug", "info", "warning", "error"), help="log.level")
