"""`outrider ls | get | device label | audit`: looking at what the hub holds, and a device's labels."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from cloud_hub.cli import screen
from cloud_hub.cli.answers import Running, read
from cloud_hub.cli.config import load_context
from cloud_hub.cli.exits import Exit
from cloud_hub.cli.hub import Document, Hub
from cloud_hub.cli.system import SystemClock
from shared.errors import InvalidValue
from shared.ids import parse_device_id

WATCH_MS: Final = 2000


class Reported(msgspec.Struct, frozen=True, kw_only=True):
    """What a device said of itself."""

    models: tuple[Running, ...] = ()
    queue_records: int = 0
    queue_bytes: int = 0


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """A device, as far as this program reads it."""

    id: str
    profile: str = ""
    online: bool = False
    boot: int = 0
    last_seen_ms: int | None = None
    agent_version: str = ""
    assignment_version: int = 0
    labels: dict[str, str] = {}
    reported: Reported | None = None


class Listed(msgspec.Struct, frozen=True, kw_only=True):
    """A model or a release in a list."""

    family: str
    version: str
    state: str = ""
    release_counter: int | None = None
    created_ms: int | None = None
    created_by: str = ""
    published_ms: int | None = None
    published_by: str | None = None


class AssignedModel(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of an assignment."""

    family: str
    version: str


class Assigned(msgspec.Struct, frozen=True, kw_only=True):
    """A device's assignment."""

    device: str
    version: int
    issued_ms: int | None = None
    models: tuple[AssignedModel, ...] = ()


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A row of the audit log."""

    seq: int
    at_ms: int
    actor: str
    action: str
    subject: str
    detail: dict[str, Any] = {}


@dataclass(frozen=True, slots=True)
class _Listing:
    path: str
    titles: tuple[str, ...]
    row: Callable[[Document, int], list[str]]
    nothing: str


def ls(arguments: argparse.Namespace) -> Exit:
    """List one kind of thing."""
    return watch(arguments, arguments.what)


def watch(arguments: argparse.Namespace, what: str) -> Exit:
    """Print a listing, and with --watch print it again every two seconds until Ctrl-C."""
    listing = _LISTINGS[what]
    hub = Hub(load_context(arguments.context))
    clock = SystemClock()
    while True:
        items = hub.items(listing.path)
        rows = [listing.row(item, clock.wall_ms()) for item in items]
        if arguments.json:
            screen.show_json({"items": items}, line=arguments.watch)
        else:
            if arguments.watch and sys.stdout.isatty():
                print("\x1b[H\x1b[2J", end="")
            screen.show_table(listing.titles, rows, nothing=listing.nothing)
        if not arguments.watch:
            return Exit.DONE
        sys.stdout.flush()
        clock.wait_ms(WATCH_MS)


def get(arguments: argparse.Namespace) -> Exit:
    """Show one device, model or release."""
    from cloud_hub.cli import models, releases

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
        print(f"{screen.clean(device.id)}: {screen.clean(_labels(device)) or 'no labels'}")
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


def moment(at_ms: int | None) -> str:
    """A moment as UTC to the second; `-` for none."""
    if at_ms is None:
        return "-"
    try:
        return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return str(at_ms)


def _show_device(document: Document) -> None:
    device = read(document, Device, what="device")
    reported = device.reported or Reported()
    pairs = [
        ("device", device.id),
        ("profile", device.profile),
        ("online", "yes" if device.online else "no"),
        ("last seen", screen.ago(device.last_seen_ms, now_ms=SystemClock().wall_ms())),
        ("boot", str(device.boot)),
        ("agent", device.agent_version or "-"),
        ("labels", _labels(device) or "-"),
        ("assignment", str(device.assignment_version)),
        ("queue", f"{reported.queue_records} records, {screen.size(reported.queue_bytes)}"),
    ]
    pairs += [("model", _running(model)) for model in reported.models]
    print(screen.fields(pairs))


def _device_row(item: Document, now_ms: int) -> list[str]:
    device = read(item, Device, what="device")
    reported = device.reported or Reported()
    return [
        device.id,
        device.profile,
        "online" if device.online else "offline",
        screen.ago(device.last_seen_ms, now_ms=now_ms),
        ", ".join(_running(model) for model in reported.models) or "-",
        str(reported.queue_records),
        _labels(device) or "-",
    ]


def _model_row(item: Document, _now_ms: int) -> list[str]:
    listed = read(item, Listed, what="model")
    return [f"{listed.family}/{listed.version}", listed.state, moment(listed.created_ms), listed.created_by]


def _release_row(item: Document, _now_ms: int) -> list[str]:
    listed = read(item, Listed, what="release")
    counter = "-" if listed.release_counter is None else str(listed.release_counter)
    return [f"{listed.family}/{listed.version}", counter, moment(listed.published_ms), listed.published_by or "-"]


def _assignment_row(item: Document, _now_ms: int) -> list[str]:
    assigned = read(item, Assigned, what="assignment")
    models = ", ".join(f"{model.family}/{model.version}" for model in assigned.models)
    return [assigned.device, str(assigned.version), models, moment(assigned.issued_ms)]


def _running(model: Running) -> str:
    text = f"{model.family}/{model.version} {model.phase}" if model.version else f"{model.family} {model.phase}"
    if model.candidate:
        text += f" (next: {model.candidate})"
    return f"{text} [{model.error_code}]" if model.error_code else text


def _labels(device: Device) -> str:
    return ",".join(f"{key}={value}" for key, value in sorted(device.labels.items()))


def _short(detail: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in detail.items())


_LISTINGS: Final[dict[str, _Listing]] = {
    "devices": _Listing(
        "/v1/devices",
        ("DEVICE", "PROFILE", "LINK", "SEEN", "MODELS", "QUEUE", "LABELS"),
        _device_row,
        "no devices; enrol one with a join token: outrider-hub token create --help",
    ),
    "models": _Listing(
        "/v1/models",
        ("MODEL", "STATE", "PUSHED (UTC)", "BY"),
        _model_row,
        "no models; upload one: outrider model push --help",
    ),
    "releases": _Listing(
        "/v1/releases",
        ("RELEASE", "COUNTER", "PUBLISHED (UTC)", "BY"),
        _release_row,
        "no releases; sign one: outrider release sign --help",
    ),
    "assignments": _Listing(
        "/v1/assignments",
        ("DEVICE", "VERSION", "MODELS", "ISSUED (UTC)"),
        _assignment_row,
        "no assignments; make some: outrider release publish FAMILY/VERSION --assign all",
    ),
}
