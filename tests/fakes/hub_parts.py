"""Parts of a hub for tests: a migrated database, certificate requests, envelopes."""

from __future__ import annotations

import base64
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from cloud_hub.devices.desk import BrokerAddress, Desk, EnrolSettings, Standings
from cloud_hub.ground import ca, migrate
from cloud_hub.ground.access import PushedOut
from cloud_hub.ground.authorities import Authorities
from cloud_hub.ground.bus import Bus
from cloud_hub.ground.ca import Authority
from cloud_hub.ground.database import Database
from cloud_hub.ground.metrics import Metrics
from cloud_hub.ground.revocation import ListState, RevokedCertificate
from shared.errors import OutriderError
from shared.ids import DeviceId
from shared.wire.envelope import Envelope
from shared.wire.messages import KIND_OF, Message, encode_body
from tests.fakes.clock import FakeClock

NOW_MS = 1_800_000_000_000
DAY_MS = 24 * 3600 * 1000

PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey


@contextmanager
def hub_database(folder: Path) -> Iterator[Database]:
    """A database with all tables."""
    database = Database(f"sqlite:///{folder / 'hub.db'}")
    try:
        migrate.upgrade(database)
        yield database
    finally:
        database.close()


def make_authority(now_ms: int = NOW_MS) -> Authority:
    """A CA of its own."""
    pair = ca.make_ca(now_ms=now_ms, label="test")
    return Authority(pair.certificate_pem, pair.key_pem)


def csr_for(key: PrivateKey, name: str = "whatever") -> str:
    """A certificate request for a key, PEM."""
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, algorithm)
    return request.public_bytes(serialization.Encoding.PEM).decode()


def new_csr() -> str:
    """A certificate request for a new P-256 key."""
    return csr_for(ec.generate_private_key(ec.SECP256R1()))


def key_pem(key: PrivateKey) -> bytes:
    """A private key as PEM."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def der(pem: str) -> bytes:
    """A PEM certificate as DER."""
    return base64.b64decode("".join(pem.strip().splitlines()[1:-1]))


class FakeAccess:
    """A broker's door, and its lists: notes what it was told, does what the test says.

    Attributes:
        told: revoked serials, denied names and kicked names of each call.
        stuck: names that it does not get out, though it ends their sessions.
        unreachable: names whose sessions it does not end.
        broken: the error that it raises instead.
        due: whether the list is.
    """

    def __init__(self) -> None:
        self.told: list[tuple[set[int], set[str], set[str]]] = []
        self.stuck: frozenset[DeviceId] = frozenset()
        self.unreachable: frozenset[DeviceId] = frozenset()
        self.broken: OutriderError | None = None
        self.due = False
        self.holds: ListState | None = None

    async def enforce(
        self, *, revoked: Collection[RevokedCertificate], denied: Collection[DeviceId], kick: Collection[DeviceId]
    ) -> PushedOut:
        """Note it."""
        if self.broken is not None:
            raise self.broken
        self.told.append(({one.serial for one in revoked}, set(denied), set(kick)))
        self.due = False
        ended = frozenset(kick) - self.unreachable
        return PushedOut(ended=ended, out=ended - self.stuck)

    def state(self) -> ListState | None:
        """What the test says."""
        return self.holds

    def is_due(self) -> bool:
        """What the test says, until the list is made."""
        return self.due


async def some_root() -> str:
    """What stands for the TUF root."""
    return '{"signed": {}}'


def make_desk(
    database: Database,
    clock: FakeClock,
    authority: Authority | Authorities,
    *,
    bus: Bus | None = None,
    metrics: Metrics | None = None,
    access: FakeAccess | None = None,
) -> Desk:
    """A devices room on this database."""
    bus, metrics, access = bus or Bus(), metrics or Metrics(), access or FakeAccess()
    standings = Standings(
        database=database, clock=clock, access=access, lists=access, bus=bus, metrics=metrics, kicks_at_start=False
    )
    return Desk(
        database=database,
        clock=clock,
        authorities=authority if isinstance(authority, Authorities) else Authorities(authority),
        bus=bus,
        metrics=metrics,
        settings=EnrolSettings(
            hub_url="https://hub.example:8443", broker=BrokerAddress(host="hub.example", port=8883), certificate_days=30
        ),
        root=some_root,
        standings=standings,
    )


def envelope_of(message: Message, *, device: str, boot: int = 1, envelope_id: str = "m1") -> Envelope:
    """The message as a device would send it."""
    return Envelope(
        v=1,
        id=envelope_id,
        kind=KIND_OF[type(message)],
        device=device,
        boot=boot,
        wall_ms=NOW_MS,
        mono_ms=1,
        body=encode_body(message),
    )
