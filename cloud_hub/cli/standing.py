"""`outrider device revoke | quarantine`: which devices are not welcome."""

from __future__ import annotations

import argparse

import msgspec

from cloud_hub.cli import screen
from cloud_hub.cli.answers import read
from cloud_hub.cli.config import load_context
from cloud_hub.cli.exits import Exit
from cloud_hub.cli.hub import Document, Hub
from shared.errors import Unreachable
from shared.ids import parse_device_id


class Changed(msgspec.Struct, frozen=True, kw_only=True):
    """What the hub says of a device's standing."""

    id: str
    standing: str
    enforced: bool = True


def revoke(arguments: argparse.Namespace) -> Exit:
    """Revoke a device; fails as unreachable when the broker has not shown that the device is out."""
    name = parse_device_id(arguments.name)
    hub = Hub(load_context(arguments.context))
    document: Document = hub.send("POST", f"/v1/devices/{name}/revoke", {"reason": arguments.reason}, Document)
    changed = read(document, Changed, what="standing")
    if arguments.json:
        screen.show_json(document)
    else:
        print(f"{screen.clean(changed.id)}: revoked; the hub takes nothing of it any more")
    if not changed.enforced:
        raise Unreachable(
            f"the broker has not shown that {name} is out",
            code="transfer.broker",
            hint="the hub goes on trying; a broker that is not the hub's has to load the list and the access list "
            "that the hub writes (docs/certificates.md)",
        )
    return Exit.DONE


def quarantine(arguments: argparse.Namespace) -> Exit:
    """Put a device into quarantine, or end that."""
    name = parse_device_id(arguments.name)
    hub = Hub(load_context(arguments.context))
    path = f"/v1/devices/{name}/quarantine"
    document: Document
    if arguments.lift:
        document = hub.send("DELETE", path, None, Document)
    else:
        document = hub.send("POST", path, {"reason": arguments.reason}, Document)
    if arguments.json:
        screen.show_json(document)
    else:
        changed = read(document, Changed, what="standing")
        print(f"{screen.clean(changed.id)}: {screen.clean(changed.standing) or 'welcome again'}")
    return Exit.DONE
