"""`outrider-hub ca show|rotate`: the fingerprint that operators and devices pin, and the change of the CA."""

from __future__ import annotations

import argparse
import secrets
from contextlib import closing
from typing import Any, Final

from sqlalchemy.engine import Connection

from cloud_hub.cli import screen
from cloud_hub.cli.exits import Exit
from cloud_hub.commands import settings
from cloud_hub.commands.tokens import actor
from cloud_hub.config import HubConfig
from cloud_hub.devices.desk import Readiness, readiness
from cloud_hub.ground import audit, migrate, rotation
from cloud_hub.ground.authorities import Phase, TrustedPair
from cloud_hub.ground.database import Database
from cloud_hub.ground.system import SystemClock
from shared.errors import Conflict

MAX_LISTED: Final = 20

_NEXT: Final[dict[Phase, str]] = {
    "steady": "nothing is under way",
    "begun": "devices learn the next CA as they renew; then: outrider-hub ca rotate switch",
    "switched": "devices get certificates of the new CA as they renew; then: outrider-hub ca rotate finish",
}


def show(arguments: argparse.Namespace) -> int:
    """Print the CA's fingerprint, or the certificate itself; during a change also the phase and who is not ready."""
    config = settings.load(arguments).config
    config.require()
    pair = rotation.load(config.folder, now_ms=SystemClock().wall_ms())
    if arguments.json:
        screen.show_json({**_document(config, pair), "pem": pair.issuing.pem})
    elif arguments.pem:
        print(pair.issuing.pem, end="")
    else:
        print(pair.issuing.fingerprint)
        if pair.other is not None:
            screen.note(_explain(pair, _ask(config, pair)))
    return Exit.DONE


def rotate(arguments: argparse.Namespace) -> int:
    """Take one step of the change; raises Conflict when it is not its turn, or the fleet is not ready."""
    config = settings.load(arguments).config
    config.require()
    now_ms = SystemClock().wall_ms()
    with rotation.alone(config.folder), closing(Database(config.database_url)) as database:
        migrate.require_current(database)
        before = rotation.load(config.folder, now_ms=now_ms)
        ready = _readiness(database, before, now_ms=now_ms)
        match arguments.step:
            case "begin":
                rotation.begin(config.folder, now_ms=now_ms, label=f"{config.hub_url} {secrets.token_hex(4)}")
            case "switch":
                if before.phase == "begun" and not arguments.force:
                    _require_none(ready.untold, "were not told of the next CA yet")
                rotation.switch(config.folder)
            case _:
                if before.phase == "switched" and not arguments.force:
                    _require_none(ready.unsigned, "have no certificate of the new CA yet")
                rotation.finish(config.folder)
        after = rotation.load(config.folder, now_ms=now_ms)
        _note(database, arguments.step, after, ready, is_forced=arguments.force, now_ms=now_ms)
    if arguments.json:
        screen.show_json(_document(config, after))
    else:
        print(f"phase {after.phase}, CA {after.issuing.fingerprint}")
        screen.note(_explain(after, _ask(config, after)))
    return Exit.DONE


def _require_none(devices: tuple[str, ...], what: str) -> None:
    if not devices:
        return
    more = f" and {len(devices) - MAX_LISTED} more" if len(devices) > MAX_LISTED else ""
    raise Conflict(
        f"{len(devices)} devices {what}: {', '.join(devices[:MAX_LISTED])}{more}",
        code="conflict.ca_stragglers",
        hint="wait until they have renewed (`outrider-hub ca show`), or go on without them with --force",
    )


def _note(database: Database, step: str, after: TrustedPair, ready: Readiness, *, is_forced: bool, now_ms: int) -> None:
    def work(conn: Connection) -> None:
        audit.record(
            conn,
            at_ms=now_ms,
            actor=actor(),
            action=f"ca.{step}",
            subject=f"ca:{after.issuing.fingerprint[:16]}",
            detail={
                "phase": after.phase,
                "other": "" if after.other is None else after.other.fingerprint,
                "forced": is_forced,
                "live": ready.live,
                "untold": len(ready.untold),
                "unsigned": len(ready.unsigned),
            },
        )

    database.write_now(work)


def _readiness(database: Database, pair: TrustedPair, *, now_ms: int) -> Readiness:
    """Readiness for the newer of the two."""
    new = pair.other if pair.phase == "begun" and pair.other is not None else pair.issuing
    return database.read_now(lambda conn: readiness(conn, ca_fingerprint=new.fingerprint, now_ms=now_ms))


def _ask(config: HubConfig, pair: TrustedPair) -> Readiness:
    with closing(Database(config.database_url)) as database:
        migrate.require_current(database)
        return _readiness(database, pair, now_ms=SystemClock().wall_ms())


def _explain(pair: TrustedPair, ready: Readiness) -> str:
    text = f"phase {pair.phase}: {_NEXT[pair.phase]}"
    if pair.phase == "begun":
        text += f"; {len(ready.untold)} of {ready.live} live devices do not know it yet"
    elif pair.phase == "switched":
        text += f"; {len(ready.unsigned)} of {ready.live} live devices have none yet"
    if ready.asleep and pair.phase != "steady":
        text += f"; {ready.asleep} are asleep: after the last step those must enrol again"
    return text


def _document(config: HubConfig, pair: TrustedPair) -> dict[str, Any]:
    document: dict[str, Any] = {
        "fingerprint": pair.issuing.fingerprint,
        "file": str(config.folder.ca_certificate),
        "expires_ms": pair.issuing.expires_ms,
        "phase": pair.phase,
        "other": None if pair.other is None else pair.other.fingerprint,
    }
    if pair.other is not None:
        ready = _ask(config, pair)
        document |= {
            "live": ready.live,
            "asleep": ready.asleep,
            "untold": list(ready.untold),
            "unsigned": list(ready.unsigned),
        }
    return document
