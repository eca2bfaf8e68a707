"""The client workflow against bytes that are not what was promised, or nothing anyone would sign."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from shared import limits
from shared.errors import TransferRefused, TrustError
from shared.release import Assignment
from shared.trust import client, metadata
from shared.trust.assignment import sign_assignment
from shared.trust.library import Metadata, TargetFile, Targets
from tests.fakes.trust_repository import (
    Device,
    TrustRepository,
    make_manifest,
    refused,
    resigned,
)

DIGITS = ("digits", "1.0.0")


@pytest.fixture
def hub() -> TrustRepository:
    hub = TrustRepository()
    hub.release(make_manifest())
    return hub


# Bytes


@pytest.mark.parametrize(
    "name",
    [
        "timestamp.json",
        "1.snapshot.json",
        "2.targets.json",
        "1.models%2Fdigits.json",
        "models/digits/1.0.0/manifest.json",
    ],
)
def test_a_changed_byte_in_any_file_is_refused(hub: TrustRepository, name: str) -> None:
    good = hub.files[name]
    codes = set()
    for position in range(0, len(good), max(1, len(good) // 60)):
        hub.files[name] = good[:position] + bytes([good[position] ^ 0x01]) + good[position + 1 :]
        try:
            Device(hub.first_root).verify(hub.assign(DIGITS), hub.serve)
        except TrustError as error:
            codes.add(error.code)
        else:
            before, after = (json.loads(data) for data in (good, hub.files[name]))
            assert name == "timestamp.json", "only what no other file promises may differ"
            assert before["signed"] == after["signed"], "and there only outside what is signed"
    assert codes <= {"trust.malformed", "trust.signature", "trust.mix_and_match", "trust.digest", "trust.rollback"}
    assert codes


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("2.root.json", limits.MAX_ROOT_BYTES),
        ("timestamp.json", limits.MAX_TIMESTAMP_BYTES),
        ("1.snapshot.json", None),
        ("2.targets.json", None),
        ("1.models%2Fdigits.json", None),
        ("models/digits/1.0.0/manifest.json", None),
    ],
)
def test_more_bytes_than_promised_are_refused(hub: TrustRepository, name: str, bound: int | None) -> None:
    good = hub.files.get(name, hub.first_root)
    hub.files[name] = good + b" " * ((bound or len(good)) + 1 - len(good)) if bound else good + b" "
    assert refused(hub, Device(hub.first_root)) == "trust.endless_data"


def test_an_endless_assignment_is_refused(hub: TrustRepository) -> None:
    document = hub.assign(DIGITS) + b" " * limits.MAX_ASSIGNMENT_BYTES
    assert refused(hub, Device(hub.first_root), document) == "trust.endless_data"


def test_an_endless_chain_of_roots_ends(hub: TrustRepository, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_ROOT_ROTATIONS", 3)
    for _ in range(4):
        hub.rotate("assignment")
    device = Device(hub.first_root)
    assert refused(hub, device) == "trust.endless_data"
    device.verify(hub.assign(DIGITS), hub.serve)


@pytest.mark.parametrize("name", ["timestamp.json", "1.snapshot.json", "2.targets.json", "1.models%2Fdigits.json"])
def test_a_missing_file_is_no_attack_and_no_unknown_target(hub: TrustRepository, name: str) -> None:
    del hub.files[name]
    with pytest.raises(TransferRefused) as caught:
        Device(hub.first_root).verify(hub.assign(DIGITS), hub.serve)
    assert caught.value.code == "transfer.missing"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("signed", "version"), True),
        (("signed", "version"), 1.0),
        (("signed", "version"), 0),
        (("signed", "version"), "1"),
        (("signed", "spec_version"), "2.0.0"),
        (("signed", "expires"), "tomorrow"),
        (("signed", "meta", "snapshot.json", "version"), True),
        (("signed", "meta", "snapshot.json", "length"), False),
        (("signed", "meta", "snapshot.json", "hashes"), []),
        (("signed", "meta"), [1]),
        (("signed", "_type"), "snapshot"),
        (("signed",), None),
        (("signatures",), {}),
        (("signatures",), [{"keyid": 1, "sig": "00"}]),
    ],
    ids=str,
)
def test_signed_nonsense_is_malformed(hub: TrustRepository, path: tuple[str, ...], value: object) -> None:
    """Signed with the right key: only the parser stands before the rest."""
    assert hub.timestamp is not None
    document = hub.timestamp.to_dict()
    node = document
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    if path[0] == "signed" and isinstance(value, float) is False and value is not None:
        hub.files["timestamp.json"] = resigned(document, hub.keys["timestamp"])
    else:
        hub.files["timestamp.json"] = json.dumps(document).encode()
    assert refused(hub, Device(hub.first_root)) == "trust.malformed"


def manifest_served(hub: TrustRepository, data: bytes) -> Assignment:
    """Sign and assign these bytes as the manifest of digits 1.0.0."""
    import hashlib

    from shared.ids import Digest
    from shared.model import FileRef

    path = "models/digits/1.0.0/manifest.json"
    role: Metadata[Targets] = hub.roles["models/digits"]
    ref = FileRef(path=path, length=len(data), digest=Digest(hashlib.sha256(data).hexdigest()))
    role.signed.targets[path] = TargetFile(ref.length, {"sha256": ref.digest}, path)
    role.signed.version += 1
    hub.files[path] = data
    hub.publish()
    assignment = hub.assignment(DIGITS)
    import msgspec

    model = msgspec.structs.replace(assignment.models[0], manifest=ref)
    return msgspec.structs.replace(assignment, models=(model,))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda text: text.replace(b'"version": "1.0.0"', b'"version": "1.0.1"'), "trust.malformed"),
        (lambda text: text.replace(b"1.0.0", b"1.0.1"), "trust.mix_and_match"),
        (lambda text: text.replace(b"digits", b"letter"), "trust.mix_and_match"),
        (lambda text: text.replace(b'"schema": 1', b'"schema": 1, "schema": 1'), "trust.malformed"),
        (lambda text: text.replace(b'"release_counter": 1', b'"release_counter": true'), "trust.malformed"),
        (lambda text: text.replace(b'"accuracy": 1.0', b'"accuracy": NaN'), "trust.malformed"),
        (lambda text: text.replace(b'"length": 6', b'"length": 7'), "trust.digest"),
        (lambda text: text.replace(b"int8.onnx", b"int9.onnx"), "trust.unknown_target"),
        (lambda text: text[:-2], "trust.malformed"),
        (lambda text: b"[]", "trust.malformed"),
        (lambda text: b"[" * 5000 + b"]" * 5000, "trust.malformed"),
    ],
)
def test_a_manifest_must_agree_with_what_is_signed(
    hub: TrustRepository, change: Callable[[bytes], bytes], code: str
) -> None:
    good = hub.files["models/digits/1.0.0/manifest.json"]
    if b'"schema"' not in good:
        good = good.replace(b'"version"', b'"schema": 1,\n "version"', 1)
    data = change(good)
    assert data != hub.files["models/digits/1.0.0/manifest.json"]
    document = sign_assignment(manifest_served(hub, data), hub.keys["assignment"][0])
    assert refused(hub, Device(hub.first_root), document) == code


def test_floors_are_named_by_key_set(hub: TrustRepository) -> None:
    name = metadata.floor_name(hub.root.signed, "timestamp")
    assert name.startswith("timestamp@")
    assert name != metadata.floor_name(hub.root.signed, "snapshot").replace("snapshot", "timestamp")
    assert client.MAX_ROLES_PER_SEARCH == 32
