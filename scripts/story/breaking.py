"""The step `altered-release`: somebody has the hub, and still no device runs what nobody signed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

from . import attacks, books
from .beginning import SECOND, THIRD, push, sign, wait_committed
from .cast import FAMILY, Device, House
from .telling import Figure, NeverTrue, Teller, expect, require, until
from .work import ask_all

REFUSED_S: Final = 20.0
PROOF_ROWS: Final = 20


def altered_release(house: House, tell: Teller) -> Mapping[str, Figure]:
    """A changed byte, a wrong key's signature, an older assignment: each refused; then an honest release goes out."""
    push(house, SECOND, "digits-2")
    sign(house, SECOND)
    house.operator.run("release", "publish", f"{FAMILY}/{SECOND}")
    codes = {
        "changed_byte": _changed_byte(house, tell),
        "older_assignment": _older_assignment(house, tell),
        "wrong_key": _wrong_key(house, tell),
    }
    began = time.monotonic()
    push(house, THIRD, "digits-3")
    sign(house, THIRD)
    house.operator.run("release", "publish", f"{FAMILY}/{THIRD}", "--assign", "all")
    wait_committed(house, THIRD)
    took_s = time.monotonic() - began
    tell.say(
        f"The next honest release, {THIRD}, was built, signed, published and committed by all three devices in "
        f"{took_s:.1f} s: what they refused was the attack, not the update."
    )
    return {**codes, "refusals": 3 * len(house.devices), "honest_release_seconds": round(took_s, 2)}


def _changed_byte(house: House, tell: Teller) -> str:
    release = house.operator.run("release", "show", f"{FAMILY}/{SECOND}")
    digest = next(file["digest"] for file in release["files"] if file["path"].endswith("/int8.onnx"))

    def attack() -> None:
        house.operator.run("release", "publish", f"{FAMILY}/{SECOND}", "--assign", "all")

    with attacks.one_byte_changed(attacks.blob_path(house.cloud, digest)):
        code = _refused(house, attack, names=("release.failed", "release.refused"), title="changed")
    tell.say(
        f"Version {SECOND} was signed properly, then one bit of its model file was changed in the hub's store. Every "
        f"device fetched it, hashed it and refused ({code}). {house.served} answers on."
    )
    return code


def _older_assignment(house: House, tell: Teller) -> str:
    documents = attacks.first_assignments(house)
    expect("devices with a first assignment", wanted=sorted(house.names), found=sorted(documents))
    code = _refused(
        house,
        partial(attacks.publish_as_hub, house.cloud, documents),
        names=("release.refused",),
        title="older",
    )
    tell.say(
        "The first assignment, once signed and valid, was sent to the devices again, with the hub's own certificate on "
        f"the broker. Every device has a newer one and refused ({code})."
    )
    return code


def _wrong_key(house: House, tell: Teller) -> str:
    forged = attacks.ForgedRelease(house)
    documents = forged.insert()
    try:
        code = _refused(
            house,
            partial(attacks.publish_as_hub, house.cloud, documents),
            names=("release.refused",),
            title="forged",
        )
    finally:
        forged.remove()
    tell.say(
        f"A release {attacks.FORGED} with another model was signed with a thief's key and put straight into the hub's "
        "database, with everything else signed by the hub's own keys: snapshot, timestamp, assignments. Every device "
        f"refused ({code}): the offline key's signature is not there."
    )
    return code


def _refused(house: House, attack: Callable[[], None], *, names: tuple[str, ...], title: str) -> str:
    """Do it, and wait until every device has refused with one and the same code and serves on; returns the code."""
    before = {device.name: len(books.events(house, device)) for device in house.devices}
    attack()
    codes = {
        until(
            f"{device.name} tells the hub that it refused",
            partial(_refusal, house, device, before[device.name], names),
            seconds=REFUSED_S,
        )
        for device in house.devices
    }
    require(len(codes) == 1, f"all devices refuse for the same reason: {codes}")
    for device in house.devices:
        model = device.model()
        expect(f"what {device.name} serves", wanted=house.served, found=model.version)
        expect(f"phase of {device.name}", wanted="committed", found=model.phase)
    tallies = ask_all(house, range(PROOF_ROWS), title=title)
    for name, tally in tallies.items():
        expect(f"versions that answered on {name}", wanted={house.served}, found=tally.versions)
        expect(f"answers of {name}", wanted=PROOF_ROWS, found=tally.asked)
    return codes.pop()


def _refusal(house: House, device: Device, seen: int, names: tuple[str, ...]) -> str | None:
    new = books.events(house, device)[seen:]
    for event in new:
        if event["name"] in names:
            return str(event["detail"].get("code", ""))
        if event["name"] in ("release.started", "release.committed"):
            raise NeverTrue(f"{device.name} took what it had to refuse: {event}")
    return None
