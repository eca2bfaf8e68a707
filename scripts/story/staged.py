"""The steps `good-rollout`, `worse-release` and `slower-release`: releases go out in stages, and bad ones come back.

The applications of all devices ask all the time and say afterwards what was true; what they say is the evidence that
decides. Nobody watches: the hub stops and rolls back by itself.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final

from cloud_hub.cli.hub import Document

from . import books
from .beginning import push, sign
from .cast import FAMILY, Device, House
from .telling import Figure, NeverTrue, Teller, expect, require, until
from .work import everyday

GOOD: Final = "1.3.0"
WORSE: Final = "1.4.0"
SLOWER: Final = "1.5.0"

OPTIONS: Final = ("--stages", "1,2,100%", "--soak", "2", "--max-harmed", "1", "--deadline", "30", "--max-ratio", "3")
"""Short soaks, so that the demo is short; what counts as worse is the hub's default."""
ROLLED_OUT_S: Final = 100.0
STAGE_S: Final = 30.0
UNHEALTHY: Final = 7
"""What a command ends with that waited for a rollout which was rolled back."""
STAGES_TITLES: Final = ("stage", "devices", "seconds", "answers", "wrong", "wrong before", "95 % within", "before")


def good_rollout(house: House, tell: Teller) -> Mapping[str, Figure]:
    """A retrained model goes to one device, to two, to all; the hub is killed on the way and goes on where it was."""
    release(house, GOOD, "digits-retrained")
    with everyday(house, title="good") as bursts:
        began = time.monotonic()
        rollout = start(house, GOOD)
        until("the first stage has passed", partial(_is_in_stage, house, rollout, 2), seconds=STAGE_S)
        killed = time.monotonic()
        house.lose_hub()
        ended = until("the rollout has ended", partial(_ended, house, rollout), seconds=ROLLED_OUT_S)
        back_s = time.monotonic() - killed
        took_s = time.monotonic() - began
        expect("end of the rollout", wanted="completed", found=ended["phase"])
        for device in house.devices:
            until(f"{device.name} serves {GOOD}", partial(device.serves, GOOD), seconds=STAGE_S)
    house.served = GOOD
    stages = _stages(house, rollout)
    expect("stages that passed", wanted=3, found=len(stages))
    expect("healthy devices at the end", wanted=len(house.devices), found=stages[-1][1])
    tell.table(STAGES_TITLES, stages)
    asked = sum(burst.asked for burst in bursts.values())
    tell.say(
        f"Version {GOOD}, trained anew, went to one device first, then to two, then to all, in {took_s:.1f} s; each "
        f"stage passed on what {asked} answers of all devices and the truths told of them showed. After the first "
        f"stage the hub was killed with kill -9; started again, it went on with the second."
    )
    return {
        "stages": len(stages),
        "seconds_in_all": round(took_s, 2),
        "seconds_after_kill": round(back_s, 2),
        "asked": asked,
        "on_it": sum(device.serves(GOOD) for device in house.devices),
    }


def worse_release(house: House, tell: Teller) -> Mapping[str, Figure]:
    """A model that learned from 40 digits passes every check of its files, and is stopped by what it answers."""
    release(house, WORSE, "digits-hasty")
    figures, reading, canary = _stopped(house, tell, version=WORSE, gate="outcomes")
    tell.say(
        f"Version {WORSE} was trained on 40 digits only. It was built, signed and installed without a complaint, "
        f"because its files are what its maker signed. On {canary.name} it then answered; the gate said: "
        f"{reading['why']}. The hub rolled it back by itself; the other devices never saw it."
    )
    return figures


def slower_release(house: House, tell: Teller) -> Mapping[str, Figure]:
    """A model with the same answers and 240 more layers: stopped by the time that its answers take."""
    release(house, SLOWER, "digits-slow", samples="few-")
    figures, reading, canary = _stopped(house, tell, version=SLOWER, gate="latency")
    tell.say(
        f"Version {SLOWER} gives the answers of {GOOD}, through 240 layers more. On {canary.name} the gate said: "
        f"{reading['why']}. Rolled back as well."
    )
    return {
        **figures,
        "p95_ms": reading["figures"]["p95_ms"],
        "before_p95_ms": reading["figures"]["before_p95_ms"],
        "ratio": reading["figures"]["ratio"],
    }


def release(house: House, version: str, model: str, *, samples: str = "") -> None:
    """Push, sign and publish; nobody is told to run it."""
    push(house, version, model, samples=samples)
    sign(house, version)
    house.operator.run("release", "publish", f"{FAMILY}/{version}")


def start(house: House, version: str) -> str:
    """Start a rollout of a published version to all devices; returns its id."""
    started = house.operator.run("rollout", "start", f"{FAMILY}/{version}", "--all", *OPTIONS)
    return str(started["id"])


def _stopped(
    house: House, tell: Teller, *, version: str, gate: str
) -> tuple[dict[str, Figure], dict[str, Any], Device]:
    """Roll a bad version out; it must be stopped in the first stage by this gate and be gone again from its device."""
    seen = {device.name: len(books.events(house, device)) for device in house.devices}
    with everyday(house, title=f"bad-{version}") as bursts:
        began = time.monotonic()
        rollout = start(house, version)
        ended = until("the rollout has ended", partial(_ended, house, rollout), seconds=ROLLED_OUT_S)
        took_s = time.monotonic() - began
        expect("end of the rollout", wanted="rolled_back", found=ended["phase"])
        touched = [device for device in house.devices if _was_touched(house, device, version, seen=seen[device.name])]
        expect("devices that ever ran it", wanted=1, found=len(touched))
        for device in house.devices:
            until(f"{device.name} serves {GOOD}", partial(device.serves, GOOD), seconds=STAGE_S)
    house.operator.run("rollout", "status", rollout, "--wait", status=UNHEALTHY)
    (canary,) = touched
    for device in house.devices:
        ran = {version, GOOD} if device is canary else {GOOD}
        answered_by = bursts[device.name].versions
        require(answered_by <= ran, f"{device.name} was answered by {ran} only: {answered_by}")
    reading = _evidence(house, tell, rollout, gate=gate)
    figures: dict[str, Figure] = {
        "seconds_to_rolled_back": round(took_s, 2),
        "touched": len(touched),
        "answers_needed": int(reading["figures"].get("answers", 0))
        or int(reading["figures"]["right"] + reading["figures"]["wrong"]),
        "others_untouched": len(house.devices) - len(touched),
    }
    return figures, reading, canary


def _evidence(house: House, tell: Teller, rollout: str, *, gate: str) -> dict[str, Any]:
    """Show what `rollout explain` says of the stop; returns the reading that failed."""
    explained = house.operator.run("rollout", "explain", rollout)
    (stop,) = [decision for decision in explained["items"] if decision["kind"] == "failed"]
    failed = [reading for reading in stop["readings"] if reading["verdict"] == "fail"]
    by_gate = {reading["gate"]: reading for reading in failed}
    require(gate in by_gate, f"it was stopped by the gate {gate}: {failed}")
    reading: dict[str, Any] = by_gate[gate]
    tell.table(("what `outrider rollout explain` shows", "value"), list(reading["figures"].items()))
    return reading


def _was_touched(house: House, device: Device, version: str, *, seen: int) -> bool:
    """Whether the device ever took this version, by its own account."""
    return any(
        event["name"].startswith("release.") and event["detail"].get("version") == version
        for event in books.events(house, device)[seen:]
    )


def _stages(house: House, rollout: str) -> Sequence[Sequence[object]]:
    """One row for each stage that passed, with what its gates saw."""
    explained = house.operator.run("rollout", "explain", rollout)
    rows: list[Sequence[object]] = []
    began_ms = 0
    for decision in explained["items"]:
        if decision["kind"] != "stage":
            continue
        if decision["text"].endswith("begins"):
            began_ms = decision["at_ms"]
        elif decision["text"].endswith("passed"):
            readings = {reading["gate"]: reading["figures"] for reading in decision["readings"]}
            outcomes, latency = readings["outcomes"], readings["latency"]
            rows.append(
                (
                    len(rows) + 1,
                    int(readings["devices"]["healthy"]),
                    f"{(decision['at_ms'] - began_ms) / 1000:.1f}",
                    int(outcomes["right"] + outcomes["wrong"]),
                    f"{outcomes['wrong_share']:.1%}",
                    f"{outcomes['before_wrong_share']:.1%}",
                    f"{latency['p95_ms']:.1f} ms",
                    f"{latency['before_p95_ms']:.1f} ms",
                )
            )
    return rows


def _status(house: House, rollout: str) -> dict[str, Any]:
    return house.operator.hub().get(f"/v1/rollouts/{rollout}", Document)


def _is_in_stage(house: House, rollout: str, number: int) -> bool:
    status = _status(house, rollout)
    if status["phase"] != "running":
        raise NeverTrue(f"the rollout runs: it is {status['phase']}: {status['reason']}")
    return bool(status["stage"] and status["stage"]["number"] >= number)


def _ended(house: House, rollout: str) -> dict[str, Any] | None:
    status = _status(house, rollout)
    return status if status["phase"] in ("completed", "aborted", "rolled_back") else None
