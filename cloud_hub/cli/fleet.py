"""`outrider ls | get | device label | audit`: looking at what the hub holds, and a device's labels."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import msgspec

from cloud_hub.cli import models, releases, screen
from cloud_hub.cli.answers import read
from cloud_hub.cli.config import load_context
from cloud_hub.cli.exits import Exit
from cloud_hub.cli.hub import Document, Hub
from cloud_hub.cli.listing import Device, Reported, labels, moment, running, watch
from cloud_hub.cli.system import SystemClock
from shared.errors import InvalidValue
from shared.ids import parse_device_id


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A row of the audit log."""

    seq: int
    at_ms: int
    actor: str
    action: str
    subject: str
    detail: dict[str, Any] = {}


def ls(arguments: argparse.Namespace) -> Exit:
    """List one kind of thing."""
    return watch(arguments, arguments.what)


def get(arguments: argparse.Namespace) -> Exit:
    """Show one device, model or release."""
    if arguments.what == "model":
        return models.show(arguments)
    if arguments.what == "release":
        return releases.show(arguments)
    name = parse_device_id(arguments.name)
    document = Hub(load_context(arguments.context)).get(f"/v1/devices/{name}", Document)
    if arguments.json:
        screen.show_json(document)
    else:
        _show_device(document)
    return Exit.DONE


def label(arguments: argparse.Namespace) -> Exit:
    """Set and remove labels of a device."""
    name = parse_device_id(arguments.name)
    changes: dict[str, str | None] = {}
    for text in arguments.changes:
        key, equals, value = text.partition("=")
        if not equals and text.endswith("-") and len(text) > 1:
            changes[text[:-1]] = None
        elif equals and key:
            changes[key] = value
        else:
            raise InvalidValue(
                f"{text!r} neither sets nor removes a label", code="invalid.label", hint="KEY=VALUE or KEY-"
            )
    hub = Hub(load_context(arguments.context))
    document: Document = hub.send("PATCH", f"/v1/devices/{name}", {"labels": changes}, Document)
    if arguments.json:
        screen.show_json(document)
    else:
        device = read(document, Device, what="device")
        print(f"{screen.clean(device.id)}: {screen.clean(labels(device)) or 'no labels'}")
    return Exit.DONE


def audit(arguments: argparse.Namespace) -> Exit:
    """List audit rows, oldest first."""
    hub = Hub(load_context(arguments.context))
    items = hub.items("/v1/audit", after=arguments.after, limit=min(arguments.limit, 500), most=arguments.limit)
    if arguments.json:
        screen.show_json({"items": items})
        return Exit.DONE
    entries = read(items, list[Entry], what="audit log")
    rows = [
        [str(entry.seq), moment(entry.at_ms), entry.actor, entry.action, entry.subject, _short(entry.detail)]
        for entry in entries
    ]
    screen.show_table(["SEQ", "AT (UTC)", "WHO", "DID", "TO", "DETAIL"], rows, nothing="no rows")
    return Exit.DONE


def _show_device(document: Document) -> None:
    device = read(document, Device, what="device")
    reported = device.reported or Reported()
    age = screen.ago(device.reported_ms, now_ms=SystemClock().wall_ms())
    told = f"reported {age} ago" if device.reported_ms else "nothing reported yet"
    pairs = [
        ("device", device.id),
        ("profile", device.profile),
        ("online", "yes" if device.online else "no"),
        *([("standing", _standing(device))] if device.standing else []),
        ("last seen", screen.ago(device.last_seen_ms, now_ms=SystemClock().wall_ms())),
        ("boot", str(device.boot)),
        ("agent", device.agent_version or "-"),
        ("labels", labels(device) or "-"),
        ("assignment", str(device.assignment_version)),
        ("queue", f"{reported.queue_records} records, {screen.size(reported.queue_bytes)} ({told})"),
    ]
    pairs += [("model", running(model)) for model in reported.models]
    print(screen.fields(pairs))


def _standing(device: Device) -> str:
    return f"{device.standing}: {device.standing_reason}" if device.standing_reason else device.standing


def _short(detail: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in _flat(detail))


def _flat(detail: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Keys with their values as text, those of an inner object after its own key and a dot."""
    for key, value in detail.items():
        if isinstance(value, dict):
            yield from ((f"{key}.{inner}", _plain(held)) for inner, held in value.items())
        else:
            yield key, _plain(value)


def _plain(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ",".join(value)
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()
