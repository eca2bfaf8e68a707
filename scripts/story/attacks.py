"""What somebody does who has broken into the hub: its files, its database, its online keys, its place on the broker.

The one thing that such a person does not have are the offline keys. Everything here goes around the hub's own checks:
straight into its folder, its database and its broker. Nothing of it is part of the product.
"""

from __future__ import annotations

import hashlib
import sqlite3
import ssl
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final

import msgspec
import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from cloud_hub.keyring import Keyring, write_key
from shared.ids import DeviceId, Digest, ModelVersion
from shared.model import FileRef, Manifest, Variant, decode_manifest, encode_manifest, target_path
from shared.release import AssignedModel, Assignment
from shared.trust import repository
from shared.trust.assignment import sign_assignment
from shared.trust.library import Metadata, Targets
from shared.trust.roles import SNAPSHOT, TIMESTAMP, family_role
from shared.wire import topics
from shared.wire.envelope import WIRE_VERSION, Envelope, encode_envelope
from shared.wire.messages import KIND_OF, Assign, encode_body

from .cast import FAMILY, Cloud, House
from .telling import require

ROLE: Final = family_role(FAMILY)
FORGED: Final = ModelVersion("6.6.6")
DAY_MS: Final = 86_400_000
PUBLISHED_S: Final = 10.0


def blob_path(cloud: Cloud, digest: str) -> Path:
    """Where the hub keeps a blob."""
    return cloud.folder / "blobs" / digest[:2] / digest


@contextmanager
def one_byte_changed(path: Path) -> Iterator[None]:
    """Flip one bit in the middle of a file for a while."""
    original = path.read_bytes()
    middle = len(original) // 2
    mode = path.stat().st_mode
    path.chmod(0o600)
    path.write_bytes(original[:middle] + bytes([original[middle] ^ 1]) + original[middle + 1 :])
    try:
        yield
    finally:
        path.write_bytes(original)
        path.chmod(mode)


def publish_as_hub(cloud: Cloud, documents: Mapping[str, Sequence[bytes]]) -> None:
    """Send assignments straight to the devices' topics, with the hub's own certificate."""
    broker = cloud.folder / "broker"
    client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="hub", protocol=mqtt.MQTTv5)
    context = ssl.create_default_context(cafile=str(broker / "ca.pem"))
    context.load_cert_chain(broker / "hub.pem", broker / "hub.key")
    client.tls_set_context(context)
    connected = threading.Event()
    client.on_connect = lambda *_arguments: connected.set()
    client.connect("localhost", cloud.broker_port, keepalive=30)
    client.loop_start()
    try:
        require(connected.wait(PUBLISHED_S), "somebody with the hub's certificate can reach the broker")
        pairs = [(device, document) for device, several in documents.items() for document in several]
        for device, document in pairs:
            topic = topics.down(DeviceId(device), "assignment")
            sent = client.publish(topic, _envelope(device, document), qos=1)
            sent.wait_for_publish(PUBLISHED_S)
            require(sent.is_published(), f"the broker took the message for {device}")
    finally:
        client.disconnect()
        client.loop_stop()


def first_assignments(house: House) -> dict[str, bytes]:
    """The oldest assignment document of each device, out of the hub's database."""
    with closing(_database(house.cloud)) as database:
        rows = database.execute(
            "SELECT device, document FROM assignments AS a WHERE version = "
            "(SELECT min(version) FROM assignments AS b WHERE b.device = a.device)"
        )
        return {str(device): bytes(document) for device, document in rows}


class ForgedRelease:
    """A release that carries a wrong key's signature, put into the hub's database past its checks.

    The thief signs the family's role with a key of his own, and snapshot, timestamp and assignments with the hub's
    online keys, which he has. `remove` takes the forged role out again; the snapshot that named it stays, and the next
    honest release outruns it, as it would after such a break-in.
    """

    def __init__(self, house: House) -> None:
        self._cloud = house.cloud
        self._house = house
        self._role_version = 0

    def insert(self) -> dict[str, bytes]:
        """Put it in; returns an assignment of it for each device."""
        now_ms = time.time_ns() // 1_000_000
        online = Keyring(self._cloud.folder / "keys")
        thief = write_key(self._house.folder.path / "thief.key")
        with closing(_database(self._cloud)) as database, database:
            current = {role: _newest(database, role) for role in (SNAPSHOT, TIMESTAMP, "targets", ROLE)}
            manifest = self._forge(repository.read_targets(current[ROLE], role=ROLE))
            role = repository.add_release(repository.read_targets(current[ROLE], role=ROLE), manifest, now_ms=now_ms)
            signed = repository.sign(role, thief)
            self._role_version = role.signed.version
            files = {"targets": current["targets"], ROLE: signed}
            snapshot = repository.new_snapshot(repository.read_snapshot(current[SNAPSHOT]), files, now_ms=now_ms)
            snapshot_bytes = repository.sign(snapshot, online.signer("snapshot"))
            stamp = repository.new_timestamp(
                repository.read_timestamp(current[TIMESTAMP]), snapshot_bytes, now_ms=now_ms
            )
            for name, version, document in (
                (ROLE, role.signed.version, signed),
                (SNAPSHOT, snapshot.signed.version, snapshot_bytes),
                (TIMESTAMP, stamp.signed.version, repository.sign(stamp, online.signer("timestamp"))),
            ):
                database.execute(
                    "INSERT INTO signed_metadata (role, version, document, stored_ms, expires_ms) "
                    "VALUES (?, ?, ?, ?, ?)",
                    (name, version, document, now_ms, now_ms + DAY_MS),
                )
            newest = dict(database.execute("SELECT device, max(version) FROM assignments GROUP BY device").fetchall())
        reference = repository.manifest_ref(manifest)
        return {
            device: sign_assignment(
                Assignment(
                    device=DeviceId(device),
                    version=version + 1,
                    issued_ms=now_ms,
                    expires_ms=now_ms + DAY_MS,
                    models=(AssignedModel(family=manifest.family, version=manifest.version, manifest=reference),),
                ),
                online.signer("assignment"),
            )
            for device, version in newest.items()
        }

    def remove(self) -> None:
        """Take the forged role out of the database."""
        with closing(_database(self._cloud)) as database, database:
            database.execute("DELETE FROM signed_metadata WHERE role = ? AND version = ?", (ROLE, self._role_version))

    def _forge(self, role: Metadata[Targets]) -> Manifest:
        """The newest release under another version, with another model file: the thief's own."""
        manifests = [self._manifest(role, path) for path in role.signed.targets if path.endswith("/manifest.json")]
        honest = max(manifests, key=lambda manifest: manifest.release_counter)
        evil = (self._house.folder.operator / "digits-3.onnx").read_bytes()
        variant = honest.variants[-1]
        forged = msgspec.structs.replace(
            honest,
            version=FORGED,
            release_counter=honest.release_counter + 100,
            golden=msgspec.structs.replace(
                honest.golden,
                file=msgspec.structs.replace(honest.golden.file, path=target_path(honest.family, FORGED, "golden.bin")),
            ),
            variants=(
                Variant(
                    name="fp32",
                    runtime="onnx",
                    file=self._store("fp32.onnx", evil, honest),
                    accuracy=variant.accuracy,
                    answers=variant.answers,
                ),
            ),
        )
        self._put(encode_manifest(forged))
        return forged

    def _manifest(self, role: Metadata[Targets], path: str) -> Manifest:
        return decode_manifest(blob_path(self._cloud, role.signed.targets[path].hashes["sha256"]).read_bytes())

    def _store(self, name: str, data: bytes, honest: Manifest) -> FileRef:
        return FileRef(path=target_path(honest.family, FORGED, name), length=len(data), digest=Digest(self._put(data)))

    def _put(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        path = blob_path(self._cloud, digest)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        if not path.exists():
            path.write_bytes(data)
        return digest


def _database(cloud: Cloud) -> sqlite3.Connection:
    return sqlite3.connect(cloud.folder / "hub.db", timeout=10)


def _newest(database: sqlite3.Connection, role: str) -> bytes:
    row = database.execute(
        "SELECT document FROM signed_metadata WHERE role = ? ORDER BY version DESC LIMIT 1", (role,)
    ).fetchone()
    return bytes(row[0])


def _envelope(device: str, document: bytes) -> bytes:
    message = Assign(document=document)
    now_ms = time.time_ns() // 1_000_000
    return encode_envelope(
        Envelope(
            v=WIRE_VERSION,
            id=hashlib.sha256(document).hexdigest()[:16],
            kind=KIND_OF[Assign],
            device=device,
            boot=0,
            wall_ms=now_ms,
            mono_ms=now_ms,
            body=encode_body(message),
        )
    )
