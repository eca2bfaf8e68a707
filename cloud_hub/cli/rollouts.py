"""`outrider rollout plan | start | status | explain | pause | resume | abort`.

A rollout is asked for by a release's name and options, or by a TOML file in the shape of shared/rollout.py `Spec`;
options say more than the file. With `--wait` the exit code says how it ended: 0 completed, 7 rolled back or aborted,
8 still running when the time was over.
"""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from cloud_hub.cli import screen
from cloud_hub.cli.answers import parse_release, read
from cloud_hub.cli.config import load_context
from cloud_hub.cli.exits import CommandFailed, Exit
from cloud_hub.cli.following import follow
from cloud_hub.cli.hub import Document, Hub
from cloud_hub.cli.listing import moment, watch
from cloud_hub.cli.system import SystemClock
from shared.errors import InvalidValue
from shared.rollout import ENDED, UNHEALTHY, Condition, Phase, Reading, parse_spec

POLL_MS: Final = 1000
MAX_FILE_BYTES: Final = 256 * 1024
SHOWN_DEVICES: Final = 50
GATES: Final = ("devices", "outcomes", "latency")
A_DAY_S: Final = 86_400
OF_A_SPEC: Final = (
    "all", "selector", "device", "stages", "soak", "max_harmed", "max_unresolved", "min_answers", "deadline",
    "baseline", "gates", "margin", "tolerance", "min_baseline", "max_ratio", "min_timed",
)  # fmt: skip
"""Options that say what a rollout shall be; a draft has said it already."""


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """The present stage."""

    number: int
    of: int
    size: int
    phase: str
    since_ms: int = 0


class Rollout(msgspec.Struct, frozen=True, kw_only=True):
    """A rollout, as far as this program reads it."""

    id: str
    family: str
    version: str
    phase: Phase
    reason: str = ""
    stage: Stage | None = None
    eligible: int = 0
    devices: dict[str, int] = {}
    returned: int = 0
    outstanding: int = 0
    stranded: int = 0
    max_harmed: int = 0
    gates: tuple[Reading, ...] = ()
    created_ms: int | None = None
    created_by: str = ""
    started_ms: int | None = None
    ended_ms: int | None = None


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """A device of a rollout."""

    device: str
    condition: str
    wish: str
    before: str | None = None
    reason: str = ""
    settled: bool = False
    stranded: bool = False


class Decided(msgspec.Struct, frozen=True, kw_only=True):
    """A decision."""

    seq: int
    at_ms: int
    actor: str
    kind: str
    text: str
    readings: tuple[Reading, ...] = ()


class Skipped(msgspec.Struct, frozen=True, kw_only=True):
    """A device that is left out."""

    device: str
    reason: str


class PlannedStage(msgspec.Struct, frozen=True, kw_only=True):
    """A stage ahead."""

    number: int
    devices: int
    added: int
    profiles: dict[str, int]
    missed_rate: float
    bytes: int


class Planned(msgspec.Struct, frozen=True, kw_only=True):
    """A rollout ahead."""

    family: str
    version: str
    eligible: tuple[str, ...]
    skipped: tuple[Skipped, ...]
    stages: tuple[PlannedStage, ...]
    bytes_per_device: int
    bytes: int
    max_harmed: int
    before_told: int
    before_wrong: int
    answers_to_find: int
    answers_to_clear: int
    least_s: int
    warnings: tuple[str, ...] = ()


def plan(arguments: argparse.Namespace) -> Exit:
    """Show what a rollout would do."""
    spec = _spec(arguments)
    document: Document = Hub(load_context(arguments.context)).send("POST", "/v1/rollouts/plan", spec, Document)
    if arguments.json:
        screen.show_json(document)
    else:
        _show_plan(read(document, Planned, what="plan"))
    return Exit.DONE


def start(arguments: argparse.Namespace) -> Exit:
    """Start a rollout, or a draft of one; with --wait see how it ends."""
    name: str = arguments.release
    is_draft = not ("/" in name or Path(name).is_file())
    _check_waiting(arguments)
    if arguments.wait and arguments.draft:
        raise _useless("--wait", "a draft is not started")
    if is_draft:
        for option in (*OF_A_SPEC, "draft"):
            value = getattr(arguments, option)
            if value not in (None, []) and value is not False:
                raise _useless(f"--{option.replace('_', '-')}", f"{name[:80]!r} is a draft and says all itself")
    hub = Hub(load_context(arguments.context))
    if not is_draft:
        body = {"spec": _spec(arguments), "draft": arguments.draft}
        document: Document = hub.send("POST", "/v1/rollouts", body, Document)
    else:
        document = hub.send("POST", f"/v1/rollouts/{_id(name)}/start", {}, Document)
    if arguments.wait:
        return _follow(hub, document, arguments)
    return _told(document, arguments, "kept as a draft" if arguments.draft else "started")


def status(arguments: argparse.Namespace) -> Exit:
    """Show one rollout, or list all of them, newest first."""
    _check_waiting(arguments)
    if arguments.wait and (arguments.watch or arguments.rollout is None):
        raise _useless("--wait", "name one rollout to wait for, without --watch")
    if arguments.rollout is None:
        return watch(arguments, "rollouts")
    hub = Hub(load_context(arguments.context))
    document = hub.get(f"/v1/rollouts/{_id(arguments.rollout)}", Document)
    if arguments.wait:
        return _follow(hub, document, arguments)
    clock = SystemClock()
    while True:
        if arguments.json:
            screen.show_json(document, line=arguments.watch)
        else:
            _show(hub, document)
        if not arguments.watch:
            return Exit.DONE
        clock.wait_ms(2 * POLL_MS)
        document = hub.get(f"/v1/rollouts/{_id(arguments.rollout)}", Document)


def explain(arguments: argparse.Namespace) -> Exit:
    """Show every decision with the numbers that it was taken from."""
    hub = Hub(load_context(arguments.context))
    name = _id(arguments.rollout)
    items = hub.items(f"/v1/rollouts/{name}/decisions")
    if arguments.json:
        screen.show_json({"rollout": arguments.rollout, "items": items})
        return Exit.DONE
    for decided in read(items, list[Decided], what="decisions"):
        print(screen.clean(f"{moment(decided.at_ms)}  {decided.actor}  {decided.kind}: {decided.text}"))
        for reading in decided.readings:
            print(screen.clean(f"    {reading.gate} {reading.verdict.value}: {reading.why}"))
            if reading.figures:
                print(
                    screen.clean("        " + " ".join(f"{name}={_number(v)}" for name, v in reading.figures.items()))
                )
    return Exit.DONE


def pause(arguments: argparse.Namespace) -> Exit:
    """Offer the release to nobody else for now."""
    return _steer(arguments, "pause", {"reason": arguments.reason}, "paused")


def resume(arguments: argparse.Namespace) -> Exit:
    """Go on, having seen what failed so far."""
    return _steer(arguments, "resume", {}, "resumed; what is harmed or unresolved so far is acknowledged")


def abort(arguments: argparse.Namespace) -> Exit:
    """End a rollout."""
    how = "devices keep what they have" if arguments.keep else "devices go back to what they ran before"
    return _steer(arguments, "abort", {"revert": not arguments.keep}, f"aborted: {how}")


def row(item: Document, _now_ms: int) -> list[str]:
    """A rollout as a row of a listing."""
    rollout = read(item, Rollout, what="rollout")
    stage = "-" if rollout.stage is None else f"{rollout.stage.number}/{rollout.stage.of} {rollout.stage.phase}"
    return [
        rollout.id,
        f"{rollout.family}/{rollout.version}",
        rollout.phase.value,
        stage,
        _conditions(rollout),
        moment(rollout.started_ms),
    ]


def _steer(arguments: argparse.Namespace, verb: str, body: Document, done: str) -> Exit:
    hub = Hub(load_context(arguments.context))
    document: Document = hub.send("POST", f"/v1/rollouts/{_id(arguments.rollout)}/{verb}", body, Document)
    return _told(document, arguments, done)


def _told(document: Document, arguments: argparse.Namespace, done: str) -> Exit:
    if arguments.json:
        screen.show_json(document)
        return Exit.DONE
    rollout = read(document, Rollout, what="rollout")
    print(screen.clean(f"{rollout.id}: {done}"))
    screen.note(f"next: outrider rollout status {rollout.id}")
    return Exit.DONE


def _follow(hub: Hub, document: Document, arguments: argparse.Namespace) -> Exit:
    """Look until it has ended, and tell of what changes."""
    timeout_s: int = arguments.timeout or A_DAY_S
    said = ""

    def look(seen: Document) -> bool:
        nonlocal said
        rollout = read(seen, Rollout, what="rollout")
        line = _line(rollout)
        if line != said:
            screen.note(line)
            said = line
        return rollout.phase in ENDED

    path = f"/v1/rollouts/{_id(read(document, Rollout, what='rollout').id)}"
    document = follow(hub, path, document, ended=look, wait_s=timeout_s, poll_ms=POLL_MS)
    rollout = read(document, Rollout, what="rollout")
    if rollout.phase not in ENDED:
        raise CommandFailed(
            f"{rollout.id} is still {rollout.phase.value} after {timeout_s} s",
            status=Exit.STILL_RUNNING,
            code="timeout.rollout",
            hint=f"outrider rollout status {rollout.id} --wait",
        )
    if arguments.json:
        screen.show_json(document)
    else:
        _show(hub, document)
    if rollout.phase in UNHEALTHY:
        raise CommandFailed(
            f"{rollout.id} {rollout.phase.value.replace('_', ' ')}: {rollout.reason}",
            status=Exit.UNHEALTHY,
            code=f"rollout.{rollout.phase.value}",
            hint=f"outrider rollout explain {rollout.id}",
        )
    return Exit.DONE


# What is asked for


def _check_waiting(arguments: argparse.Namespace) -> None:
    if arguments.timeout is not None and not arguments.wait:
        raise _useless("--timeout", "it says how long --wait waits")


def _useless(option: str, why: str) -> InvalidValue:
    """An option that would be taken and do nothing is refused."""
    return InvalidValue(f"{option} does nothing here: {why}", code="invalid.options")


def _spec(arguments: argparse.Namespace) -> Document:
    """The file's rollout with what the options say on top, checked here as the hub will."""
    name: str = arguments.release
    path = Path(name)
    if path.is_file():
        document = _file(path)
    else:
        family, version = parse_release(name)
        document = {"family": family, "version": version}
    select = _selection(arguments)
    if select:
        document["select"] = select
    given = {
        "stages": arguments.stages.split(",") if arguments.stages else None,
        "soak_s": arguments.soak,
        "max_harmed": arguments.max_harmed,
        "max_unresolved": arguments.max_unresolved,
        "min_answers": arguments.min_answers,
        "deadline_s": arguments.deadline,
        "baseline_s": arguments.baseline,
    }
    document |= {key: value for key, value in given.items() if value is not None}
    if gates := _gates(arguments, document.get("gates", {})):
        document["gates"] = gates
    parse_spec(document)
    return document


def _file(path: Path) -> Document:
    try:
        data = path.read_bytes()[: MAX_FILE_BYTES + 1]
        if len(data) > MAX_FILE_BYTES:
            raise InvalidValue(f"{path} is larger than {MAX_FILE_BYTES} bytes", code="invalid.rollout")
        return tomllib.loads(data.decode())
    except OSError as error:
        raise InvalidValue(f"{path} cannot be read: {error.strerror}", code="invalid.rollout") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidValue(f"{path} is not TOML: {error}", code="invalid.rollout") from error


def _selection(arguments: argparse.Namespace) -> Document | None:
    if arguments.all:
        return {"all": True}
    if arguments.device:
        return {"devices": list(arguments.device)}
    labels = {}
    for text in arguments.selector:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise InvalidValue(f"--selector {text!r} is not KEY=VALUE", code="invalid.selector")
        labels[key] = value
    return {"labels": labels} if labels else None


def _gates(arguments: argparse.Namespace, file: Any) -> Document:
    gates: Document = {name: dict(file.get(name, {})) for name in file} if isinstance(file, dict) else {}
    if arguments.gates is not None:
        wanted = set() if arguments.gates == "none" else set(arguments.gates.split(","))
        if unknown := sorted(wanted - set(GATES)):
            raise InvalidValue(
                f"--gates: there is no gate {unknown[0]!r}", code="invalid.gates", hint=f"none, or of {','.join(GATES)}"
            )
        for name in GATES:
            gates.setdefault(name, {})["enabled"] = name in wanted
    for gate, field, value in (
        ("outcomes", "margin", arguments.margin),
        ("outcomes", "tolerance", arguments.tolerance),
        ("outcomes", "min_baseline", arguments.min_baseline),
        ("latency", "max_ratio", arguments.max_ratio),
        ("latency", "min_answers", arguments.min_timed),
    ):
        if value is not None:
            gates.setdefault(gate, {})[field] = value
    return gates


def _id(name: str) -> str:
    """A rollout's name for a path; raises InvalidValue for what cannot be one."""
    if not name or len(name) > 160 or not name.isascii() or not all(one.isalnum() or one in "-." for one in name):
        raise InvalidValue(
            f"{name[:80]!r} is not a rollout", code="invalid.rollout", hint="`outrider rollout status` lists them"
        )
    return name


# What is shown


def _show_plan(planned: Planned) -> None:
    told, wrong = planned.before_told, planned.before_wrong
    before = f"{wrong} of {told} answers wrong" if told else "no answer with a known outcome"
    print(
        screen.fields(
            [
                ("release", f"{planned.family}/{planned.version}"),
                ("eligible", f"{len(planned.eligible)} devices"),
                ("skipped", f"{len(planned.skipped)} devices"),
                ("bytes", f"at most {screen.size(planned.bytes_per_device)} each, {screen.size(planned.bytes)} in all"),
                ("at least", f"{planned.least_s} s of soaking"),
                ("bears", f"{planned.max_harmed} harmed devices"),
                ("before", before),
                ("power", f"about {planned.answers_to_find} answers find a release that is worse by the margin, about "
                 f"{planned.answers_to_clear} clear one that is as good"),
            ]
        )
    )  # fmt: skip
    rows = [
        [
            str(stage.number),
            str(stage.devices),
            str(stage.added),
            ", ".join(f"{count} {name}" for name, count in sorted(stage.profiles.items())),
            f"< {stage.missed_rate:.1%}",
            screen.size(stage.bytes),
        ]
        for stage in planned.stages
    ]
    titles = ["STAGE", "DEVICES", "NEW", "PROFILES", "CAN MISS", "BYTES"]
    screen.show_table(titles, rows, nothing="no stages: no device is eligible")
    if planned.skipped:
        shown = [[one.device, one.reason] for one in planned.skipped[:SHOWN_DEVICES]]
        screen.show_table(["SKIPPED", "WHY"], shown, nothing="")
    for warning in planned.warnings:
        screen.note(f"note: {warning}")


def _show(hub: Hub, document: Document) -> None:
    rollout = read(document, Rollout, what="rollout")
    pairs = [
        ("rollout", rollout.id),
        ("release", f"{rollout.family}/{rollout.version}"),
        ("phase", rollout.phase.value),
        ("why", rollout.reason),
        ("stage", _stage(rollout.stage)),
        ("devices", _conditions(rollout)),
        ("bears", f"{rollout.max_harmed} harmed devices"),
        ("started", f"{moment(rollout.started_ms)} UTC by {rollout.created_by}"),
        ("ended", f"{moment(rollout.ended_ms)} UTC" if rollout.ended_ms else ""),
    ]
    if rollout.returned or rollout.outstanding or rollout.stranded:
        back = f"{rollout.returned} returned, {rollout.outstanding} not yet, {rollout.stranded} cannot"
        pairs.append(("going back", back))
    print(screen.fields([(name, value) for name, value in pairs if value]))
    rows = [[reading.gate, reading.verdict.value, reading.why] for reading in rollout.gates]
    if rows:
        screen.show_table(["GATE", "SAYS", "BECAUSE"], rows, nothing="")
    items = hub.items(f"/v1/rollouts/{_id(rollout.id)}/devices", most=SHOWN_DEVICES)
    _show_devices(read(items, list[Device], what="devices"))


def _show_devices(devices: Sequence[Device]) -> None:
    rows = [[one.device, one.condition, one.before or "-", _state(one), one.reason or "-"] for one in devices]
    screen.show_table(["DEVICE", "IS", "RAN BEFORE", "SHALL RUN", "BECAUSE"], rows, nothing="no devices yet")


def _state(device: Device) -> str:
    if device.wish == "before":
        return "what it ran before" + (" (does)" if device.settled else " (cannot)" if device.stranded else "")
    return "the release" if device.wish == "target" else "-"


def _stage(stage: Stage | None) -> str:
    if stage is None:
        return "-"
    return f"{stage.number} of {stage.of} ({stage.size} devices), {stage.phase} since {moment(stage.since_ms)} UTC"


def _conditions(rollout: Rollout) -> str:
    shown = [f"{rollout.devices[one.value]} {one.value}" for one in Condition if rollout.devices.get(one.value)]
    return ", ".join(shown) or "-"


def _line(rollout: Rollout) -> str:
    """A rollout in one line, which changes only when something happened."""
    stage = "" if rollout.stage is None else f", stage {rollout.stage.number}/{rollout.stage.of} {rollout.stage.phase}"
    reason = f" ({rollout.reason})" if rollout.reason else ""
    return f"{rollout.id} {rollout.phase.value}{stage}: {_conditions(rollout)}{reason}"


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else f"{value:g}"
