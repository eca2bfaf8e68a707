"""Thousands of damaged files and signed oddities: a refresh ends in trust or in one of our refusals, nothing else."""

from __future__ import annotations

import json
import random

import pytest

from shared.errors import TransferError, TrustError
from tests.fakes.mutations import mutate
from tests.fakes.trust_repository import Device, TrustRepository, make_manifest, promise_again, resigned

DIGITS = ("digits", "1.0.0")
FILES = {
    "1.root.json": "root",
    "timestamp.json": "timestamp",
    "1.snapshot.json": "snapshot",
    "2.targets.json": "targets",
    "1.models%2Fdigits.json": "release",
}


def outcome(device: Device, hub: TrustRepository, document: bytes) -> str:
    try:
        device.verify(document, hub.serve)
    except (TrustError, TransferError) as error:
        return error.code
    return "accepted"


@pytest.mark.parametrize("seed", range(4))
def test_signed_oddities_end_in_our_refusals(seed: int) -> None:
    rng = random.Random(seed)
    hub = TrustRepository()
    hub.release(make_manifest())
    promise_again(hub)
    document = hub.assign(DIGITS)
    files = dict(hub.files)
    seen: dict[str, int] = {}
    for _ in range(1000):
        name = rng.choice(list(FILES))
        mutated = mutate(json.loads(files[name]), rng)
        try:
            data = resigned(mutated, hub.keys[FILES[name]])
        except Exception:  # what cannot be written canonically is served with a signature that does not hold
            data = json.dumps(mutated).encode()
        hub.files = {**files, name: data}
        code = outcome(Device(hub.files["1.root.json"]), hub, document)
        seen[code] = seen.get(code, 0) + 1
    assert seen["trust.malformed"] > 150
    assert seen["accepted"] > 5, "fields that nobody knows are no reason to refuse"


def test_damaged_bytes_end_in_our_refusals() -> None:
    rng = random.Random(7)
    hub = TrustRepository()
    hub.release(make_manifest())
    document = hub.assign(DIGITS)
    files = {**hub.files, "assignment": document}
    for _ in range(3000):
        name = rng.choice(list(files))
        data = bytearray(files[name])
        for _ in range(rng.choice([1, 1, 1, 3, 20])):
            place = rng.randrange(len(data))
            match rng.randrange(4):
                case 0:
                    data[place] = rng.randrange(256)
                case 1:
                    del data[place : place + rng.randrange(1, 40)]
                    data = data or bytearray(b"{")
                case 2:
                    data[place:place] = rng.choice([b"[" * 2000, b"{", b'"', b"\\ud800", b"1e999", b"NaN", b"\xff"])
                case _:
                    data[place:place] = data[place : place + rng.randrange(1, 80)]
        hub.files = {**files, name: bytes(data)}
        code = outcome(Device(hub.files["1.root.json"]), hub, hub.files["assignment"])
        if name == "assignment":
            assert code != "accepted" or json.loads(bytes(data))["signed"] == json.loads(document)["signed"]


def test_a_damaged_cache_is_never_an_error_and_never_believed() -> None:
    rng = random.Random(11)
    hub = TrustRepository()
    hub.release(make_manifest())
    device = Device(hub.first_root)
    document = hub.assign(DIGITS)
    device.verify(document, hub.serve)
    good = dict(device.cache)
    for _ in range(300):
        role = rng.choice(list(good))
        data = bytearray(good[role])
        data[rng.randrange(len(data))] = rng.randrange(256)
        device.cache = {**good, role: bytes(data)}
        assert outcome(device, hub, document) == "accepted"
