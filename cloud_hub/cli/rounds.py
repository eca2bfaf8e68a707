"""`outrider round start | status | ls | stop`."""

from __future__ import annotations

import argparse
from typing import Any, Final

import msgspec

from cloud_hub.cli import screen
from cloud_hub.cli.answers import read
from cloud_hub.cli.config import load_context
from cloud_hub.cli.exits import CommandFailed, Exit
from cloud_hub.cli.following import follow
from cloud_hub.cli.hub import Document, Hub
from cloud_hub.cli.listing import moment
from shared.errors import InvalidValue
from shared.ids import ModelVersion, parse_family, parse_version
from shared.model import is_learned

POLL_MS: Final = 300
ACTIVE: Final = ("running", "building")


class Spec(msgspec.Struct, frozen=True, kw_only=True):
    """What a run was started with, as far as this program reads it."""

    family: str
    base: str
    version: str
    rounds: int
    strategy: str = ""


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """A finished round."""

    round: int
    asked: int = 0
    accepted: int = 0
    took_ms: int = 0
    metrics: dict[str, float] = {}
    refused: dict[str, str] = {}


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """A run."""

    run: str
    state: str
    round: int
    spec: Spec
    created_ms: int | None = None
    created_by: str = ""
    features: str = ""
    accuracy: float | None = None
    code: str = ""
    reason: str = ""
    hint: str = ""
    rounds: tuple[Round, ...] = ()


def start(arguments: argparse.Namespace) -> Exit:
    """Begin a run, and with --wait see how it ends."""
    request: dict[str, Any] = {
        "family": parse_family(arguments.family),
        "base": parse_version(arguments.base),
        "version": parse_version(arguments.result),
        "selector": _selector(arguments.selector),
        "evaluate": arguments.evaluate,
    }
    for name in ("rounds", "strategy", "min_devices", "quorum", "learning_rate", "epochs", "batch_size", "seed"):
        if getattr(arguments, name) is not None:
            request[name] = getattr(arguments, name)
    if arguments.learned:
        request["learned"] = True
    if arguments.features is not None:
        request["features"] = arguments.features
    if arguments.round_timeout is not None:
        request["round_timeout_s"] = arguments.round_timeout
    hub = Hub(load_context(arguments.context))
    document: Document = hub.send("POST", "/v1/rounds", request, Document)
    if arguments.wait:
        document = _wait(hub, document, wait_s=arguments.wait_s)
    return _report(document, as_json=arguments.json)


def status(arguments: argparse.Namespace) -> Exit:
    """Show one run with its rounds."""
    hub = Hub(load_context(arguments.context))
    document = hub.get(_path(arguments.run_id), Document)
    if arguments.wait:
        return _report(_wait(hub, document, wait_s=arguments.wait_s), as_json=arguments.json)
    _show(document, as_json=arguments.json)
    return Exit.DONE


def ls(arguments: argparse.Namespace) -> Exit:
    """List runs, newest first."""
    items = Hub(load_context(arguments.context)).items("/v1/rounds")
    if arguments.json:
        screen.show_json({"items": items})
        return Exit.DONE
    rows = []
    for run in read(items, list[Run], what="list of runs"):
        spec = run.spec
        rows.append(
            [
                run.run,
                run.state,
                f"{run.round}/{spec.rounds}",
                spec.strategy,
                f"{spec.family}/{spec.base} -> {spec.version}",
                moment(run.created_ms),
                run.created_by,
            ]
        )
    screen.show_table(
        ["RUN", "STATE", "ROUND", "STRATEGY", "LEARNS", "STARTED (UTC)", "BY"],
        rows,
        nothing="no runs; start one: outrider round start --help",
    )
    return Exit.DONE


def stop(arguments: argparse.Namespace) -> Exit:
    """End a run for good."""
    hub = Hub(load_context(arguments.context))
    document: Document = hub.send("POST", f"{_path(arguments.run_id)}/stop", {}, Document)
    _show(document, as_json=arguments.json)
    return Exit.DONE


def _wait(hub: Hub, document: Document, *, wait_s: int) -> Document:
    """Tell of each round; raises CommandFailed when the run goes on after that time."""
    said = 0

    def look(seen: Document) -> bool:
        nonlocal said
        run = read(seen, Run, what="run")
        for done in run.rounds[said:]:
            screen.note(f"round {done.round}/{run.spec.rounds}: {_figures(done)}")
        said = len(run.rounds)
        return run.state not in ACTIVE

    name = read(document, Run, what="run").run
    document = follow(hub, _path(name), document, ended=look, wait_s=wait_s, poll_ms=POLL_MS)
    run = read(document, Run, what="run")
    if run.state in ACTIVE:
        raise CommandFailed(
            f"run {run.run} is still {run.state}",
            status=Exit.STILL_RUNNING,
            code="timeout.round",
            hint=f"outrider round status {run.run}",
        )
    return document


def _report(document: Document, *, as_json: bool) -> Exit:
    run = read(document, Run, what="run")
    _show(document, as_json=as_json)
    if run.state in ("failed", "stopped"):
        raise CommandFailed(
            f"run {run.run} {run.state}: {run.reason}",
            status=Exit.FAILED if run.state == "failed" else Exit.UNHEALTHY,
            code=run.code or "rounds.failed",
            hint=run.hint or f"outrider round status {run.run}",
        )
    if run.state == "finished":
        name = f"{run.spec.family}/{run.spec.version}"
        is_signed = is_learned(ModelVersion(run.spec.version))  # by the hub itself
        screen.note(f"next: outrider {'rollout start ' + name if is_signed else f'release sign {name} --keys DIR'}")
    else:
        screen.note(f"see how it goes: outrider round status {run.run}")
    return Exit.DONE


def _show(document: Document, *, as_json: bool) -> None:
    if as_json:
        screen.show_json(document)
        return
    run = read(document, Run, what="run")
    spec = run.spec
    pairs = [
        ("run", run.run),
        ("state", run.state),
        ("learns", f"the head of {spec.family}/{spec.base} on output {run.features!r}, as {spec.version}"),
        ("strategy", spec.strategy),
        ("round", f"{run.round} of {spec.rounds}"),
    ]
    if run.accuracy is not None:
        pairs.append(("accuracy", f"{run.accuracy:.1%} of the base's golden samples"))
    if run.reason:
        pairs.append(("reason", run.reason))
    print(screen.fields(pairs))
    rows = [
        [
            str(done.round),
            f"{done.accepted}/{done.asked}",
            _share(done.metrics.get("accuracy")),
            _share(done.metrics.get("train.accuracy")),
            f"{done.took_ms / 1000:.2f} s",
            "; ".join(f"{device}: {reason}" for device, reason in sorted(done.refused.items())) or "-",
        ]
        for done in run.rounds
    ]
    if rows:
        screen.show_table(["ROUND", "DEVICES", "ACCURACY", "ON DEVICES", "TOOK", "REFUSED"], rows, nothing="")


def _figures(done: Round) -> str:
    return (
        f"{done.accepted} of {done.asked} devices, accuracy {_share(done.metrics.get('accuracy'))}, "
        f"{done.took_ms / 1000:.2f} s"
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _selector(pairs: list[str]) -> dict[str, str]:
    found = {}
    for text in pairs:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise InvalidValue(
                f"--selector {text!r} is not KEY=VALUE",
                code="invalid.selector",
                hint="give a label that devices have, for example --selector site=north",
            )
        found[key] = value
    return found


def _path(name: str) -> str:
    if not name or not all(character.isalnum() or character == "-" for character in name):
        raise InvalidValue(f"{name[:40]!r} is not a run's name", code="invalid.run", hint="outrider round ls")
    return f"/v1/rounds/{name}"
