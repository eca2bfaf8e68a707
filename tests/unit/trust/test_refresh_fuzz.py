"""Thousands of damaged files and signed oddities: a refresh ends in trust or in one of our refusals, nothing else."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import pytest

from shared.errors import TransferError, TrustError
from tests.fakes.trust_repository import Device, TrustRepository, make_manifest, promise_again, resigned

DIGITS = ("digits", "1.0.0")
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**53, 2**70, 1.5, "", "x", "\ud800", "../x", "2030-01-01T00:00:00Z", [], {},
    [[]], {"keyids": [], "threshold": 1}, ["a", "a"], "é" * 50,
]  # fmt: skip
FILES = {
    "1.root.json": "root",
    "timestamp.json": "timestamp",
    "1.snapshot.json": "snapshot",
    "2.targets.json": "targets",
    "1.models%2Fdigits.json": "release",
}


def nodes(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of everything inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [path] if path else []
    for key, child in inner:
        found += nodes(child, (*path, key))
    return found


def mutate(document: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Delete, replace, rename or add one node."""
    changed = copy.deepcopy(document)
    path = rng.choice(nodes(changed["signed"]))
    node = changed["signed"]
    for key in path[:-1]:
        node = node[key]
    match rng.randrange(4):
        case 0:
            del node[path[-1]]
        case 1 | 2:
            node[path[-1]] = copy.deepcopy(rng.choice(ODD))
        case _ if isinstance(node, dict):
            node[rng.choice(["x", "", "version", "name", "../x"])] = copy.deepcopy(rng.choice(ODD))
        case _:
            node.append(copy.deepcopy(rng.choice(ODD)))
    return changed


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
