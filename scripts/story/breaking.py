"""The step `altered-release`: somebody has the hub, and still no device runs what nobody signed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import Final

from . import attacks, books
from .beginning import SECOND, THIRD, push, sign, wait_committed
from .cast import FAMILY, Device, House
from .telling import Figure, NeverTrue, Teller, expect, require, until
from .work import ask_all

REFUSED_S: Final = 20.0
PROOF_ROWS: Final = 20
REFUSALS: Final = ("release.refused", "release.failed")
TAKEN: Final = ("release.started", "release.committed")


def altered_release(house: House, tell: Teller) -> Mapping[str, Figure]:
    """A changed byte, an older assignment, a wrong key's signature: each refused; then an honest release goes out."""
    push(house, SECOND, "digits-2")
    sign(house, SECOND)
    house.operator.run("release", "publish", f"{FAMILY}/{SECOND}")
    codes = {"changed_byte": _changed_byte(house, tell), **_forged_documents(house, tell)}
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
    return {**codes, "refusals": len(codes) * len(house.devices), "honest_release_seconds": round(took_s, 2)}


def _changed_byte(house: House, tell: Teller) -> str:
    """The release is signed properly; one bit of its model file is changed in the hub's store."""
    release = house.operator.run("release", "show", f"{FAMILY}/{SECOND}")
    digest = next(file["digest"] for file in release["files"] if file["path"].endswith("/int8.onnx"))
    seen = _event_counts(house)
    with attacks.one_byte_changed(attacks.blob_path(house.cloud, digest)):
        house.operator.run("release", "publish", f"{FAMILY}/{SECOND}", "--assign", "all")
        (code,) = _refused(house, seen, wanted=1)
        _serves_on(house, title="changed")
    tell.say(
        f"Version {SECOND} was signed properly, then one bit of its model file was changed in the hub's store. Every "
        f"device fetched it, hashed it and refused: {code}. {house.served} answers on."
    )
    return code


def _forged_documents(house: House, tell: Teller) -> dict[str, Figure]:
    """Both are sent with the hub's own certificate, past the hub: an older assignment, then one of a forged release."""
    older = attacks.first_assignments(house)
    expect("devices with a first assignment", wanted=sorted(house.names), found=sorted(older))
    forged = attacks.ForgedRelease(house)
    newer = forged.insert()
    seen = _event_counts(house)
    try:
        attacks.publish_as_hub(house.cloud, {name: [older[name], newer[name]] for name in house.names})
        _serves_on(house, title="forged")
        replayed, unsigned = _refused(house, seen, wanted=2)
        _serves_on(house, title="forged-later")
    finally:
        forged.remove()
    tell.say(
        "The first assignment, once signed and valid, was sent to the devices again, with the hub's own certificate on "
        f"the broker. Every device has a newer one and refused: {replayed}."
    )
    tell.say(
        f"A release {attacks.FORGED} with another model was signed with a thief's key and put straight into the hub's "
        "database, and everything else signed with the hub's own keys: snapshot, timestamp, assignments. Every device "
        f"refused: {unsigned}, because the offline key's signature is not there. {house.served} answers on."
    )
    return {"older_assignment": replayed, "wrong_key": unsigned}


def _event_counts(house: House) -> dict[str, int]:
    return {device.name: len(books.events(house, device)) for device in house.devices}


def _refused(house: House, seen: dict[str, int], *, wanted: int) -> tuple[str, ...]:
    """Wait until every device has told the hub of that many kinds of refusal; returns their codes, the same for all."""
    codes = {
        until(
            f"{device.name} tells the hub that it refused",
            partial(_refusals, house, device, seen=seen[device.name], wanted=wanted),
            seconds=REFUSED_S,
        )
        for device in house.devices
    }
    require(len(codes) == 1, f"all devices refuse for the same reasons: {codes}")
    return codes.pop()


def _refusals(house: House, device: Device, *, seen: int, wanted: int) -> tuple[str, ...] | None:
    codes: list[str] = []
    for event in books.events(house, device)[seen:]:
        if event["name"] in REFUSALS:
            codes.append(str(event["detail"].get("code", "")))
        elif event["name"] in TAKEN:
            raise NeverTrue(f"{device.name} took what it had to refuse: {event}")
    # The hub sends what a device has not taken again and again; each kind of refusal counts once.
    kinds = tuple(dict.fromkeys(codes))
    return kinds if len(kinds) >= wanted else None


def _serves_on(house: House, *, title: str) -> None:
    """The version from before serves on every device, and answers."""
    for device in house.devices:
        model = device.model()
        expect(f"what {device.name} serves", wanted=house.served, found=model.version)
        expect(f"phase of {device.name}", wanted="committed", found=model.phase)
    for name, tally in ask_all(house, range(PROOF_ROWS), title=title).items():
        expect(f"versions that answered on {name}", wanted={house.served}, found=tally.versions)
        expect(f"answers of {name}", wanted=PROOF_ROWS, found=tally.asked)
