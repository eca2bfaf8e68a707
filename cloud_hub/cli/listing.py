"""Lists of what the hub holds, as tables or JSON, once or again and again."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

import msgspec

from cloud_hub.cli import screen
from cloud_hub.cli.answers import Running, read
from cloud_hub.cli.config import load_context
from cloud_hub.cli.exits import Exit
from cloud_hub.cli.hub import Document, Hub
from cloud_hub.cli.system import SystemClock

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
    reported_ms: int | None = None
    reported: Reported | None = None
    standing: str = ""
    standing_reason: str = ""


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


@dataclass(frozen=True, slots=True)
class _Listing:
    path: str
    titles: tuple[str, ...]
    row: Callable[[Document, int], list[str]]
    nothing: str


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


def moment(at_ms: int | None) -> str:
    """A moment as UTC to the second; `-` for none."""
    if at_ms is None:
        return "-"
    try:
        return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return str(at_ms)


def running(model: Running) -> str:
    """A model slot in a few words: `digits/1.0.0 committed`."""
    text = f"{model.family}/{model.version} {model.phase}" if model.version else f"{model.family} {model.phase}"
    if model.candidate:
        text += f" (next: {model.candidate})"
    return f"{text} [{model.error_code}]" if model.error_code else text


def labels(device: Device) -> str:
    """A device's labels as `key=value,key=value`."""
    return ",".join(f"{key}={value}" for key, value in sorted(device.labels.items()))


def _device_row(item: Document, now_ms: int) -> list[str]:
    device = read(item, Device, what="device")
    reported = device.reported or Reported()
    return [
        device.id,
        device.profile,
        device.standing or ("online" if device.online else "offline"),
        screen.ago(device.last_seen_ms, now_ms=now_ms),
        ", ".join(running(model) for model in reported.models) or "-",
        _queue(device, reported, now_ms),
        labels(device) or "-",
    ]


def _queue(device: Device, reported: Reported, now_ms: int) -> str:
    # A device reports now and then, and not at all while it is away: the figure is as old as its report.
    if not device.reported_ms:
        return "-"
    return f"{reported.queue_records} ({screen.ago(device.reported_ms, now_ms=now_ms)} ago)"


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


def _rollout_row(item: Document, now_ms: int) -> list[str]:
    from cloud_hub.cli import rollouts

    return rollouts.row(item, now_ms)


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
    "rollouts": _Listing(
        "/v1/rollouts",
        ("ROLLOUT", "RELEASE", "PHASE", "STAGE", "DEVICES", "STARTED (UTC)"),
        _rollout_row,
        "no rollouts; start one: outrider rollout start --help",
    ),
}
