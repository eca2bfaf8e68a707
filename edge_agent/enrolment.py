"""Enrolment: a join token is traded for the device's identity. Runs in a command, never in the daemon.

Rules of this file:
1. First contact in two steps. The CA is fetched over a connection that nobody vouches for and held against the
   fingerprint in the token; only a second connection, verified with that CA, carries the token and the request.
2. The key is made here and never leaves; it is on disk, 0600, before the hub is asked to sign for it.
3. The answer is believed only as far as it can be checked: the certificate must be for this key, under the name
   that the hub says, signed by the pinned CA.
4. Either nothing counts or everything does: `identity.json` is removed first and written last, each file is synced.
5. What belongs to another identity (queue, floors, metadata) is moved aside, never mixed in and never deleted.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import http.client
import os
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from edge_agent.adapters.database import DATABASE_NAME
from edge_agent.adapters.ledger import forget_lost_floors
from edge_agent.adapters.lock import AgentLock
from edge_agent.identity import (
    IDENTITY_DIR,
    TRUST_DIR,
    Identity,
    IdentityFile,
    check_hub_url,
    load_identity,
)
from shared.clock import Clock
from shared.errors import (
    ConfigError,
    Conflict,
    InvalidValue,
    OutriderError,
    ProtocolViolation,
    StorageError,
    TransferRefused,
    TrustError,
    Unreachable,
)
from shared.ids import parse_device_id
from shared.join import JoinToken, decode_join_token
from shared.limits import KIB, MAX_ROOT_BYTES

TIMEOUT_S: Final = 15.0
MAX_ANSWER_BYTES: Final = MAX_ROOT_BYTES + 64 * KIB


class _Broker(msgspec.Struct, frozen=True):
    host: str
    port: int


class _Enrolled(msgspec.Struct, frozen=True):
    device: str
    certificate_pem: str
    ca_pem: str
    hub_url: str
    broker: _Broker
    root: str


class _Problem(msgspec.Struct, frozen=True):
    detail: str = ""
    code: str = ""
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Enrolment:
    """What came of it: the new identity, and what was moved aside because it belonged to another one."""

    identity: Identity
    moved_aside: tuple[Path, ...]


def enroll(*, token: str, state_dir: Path, profile: str, name: str | None, force: bool, clock: Clock) -> Enrolment:
    """Trade the token for an identity below the state directory.

    Raises:
        InvalidValue: the text is not a join token.
        Conflict: the device is enrolled already and `force` is not set, or an agent is running here.
        Unreachable: the hub does not answer; the token is not spent.
        TransferRefused: the hub refuses the token or the name; the code is the hub's.
        TrustError: the hub is not the one that the token was made by, or its answer does not hold.
        StorageError: the state directory cannot be written.
    """
    join = decode_join_token(token)
    _make_folder(state_dir)
    with AgentLock(state_dir):
        before = _enrolled_before(state_dir)
        if before is not None and not force:
            raise Conflict(
                f"this device is enrolled as {before.device} at {before.hub_url}",
                code="conflict.enrolled",
                hint="to replace that identity, run the command with --force: the old key and certificate are "
                "overwritten, and queue, floors and metadata of another device or hub are moved aside",
            )
        ca_pem = _pinned_ca(join)
        folder = state_dir / IDENTITY_DIR
        _make_folder(folder)
        csr_pem = _new_key(folder / "device.key.new")
        answer = _ask(join, ca_pem, body={"token": token.strip(), "csr_pem": csr_pem, "profile": profile, "name": name})
        issued_ms = _check(answer, csr_pem=csr_pem, ca_pem=ca_pem)
        at_ms = clock.wall_ms()
        _stage(folder, answer, ca_pem=ca_pem, profile=profile, at_ms=at_ms, issued_ms=issued_ms)
        moved = _set_aside(state_dir, before, answer, ca_pem=ca_pem, at_ms=at_ms)
        _swap(state_dir)
    return Enrolment(identity=load_identity(state_dir), moved_aside=moved)


def _enrolled_before(state_dir: Path) -> Identity | None:
    try:
        return load_identity(state_dir)
    except ConfigError:
        return None


def _pinned_ca(join: JoinToken) -> str:
    """The hub's CA as PEM, held against the token's fingerprint; nothing secret is sent."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    status, body = _exchange(join.hub_url, context, method="GET", path="/v1/ca", body=None)
    if status != 200:
        raise TransferRefused(
            f"{join.hub_url} answered {status} to the question for its CA", hint="check that this is an Outrider hub"
        )
    try:
        der = ssl.PEM_cert_to_DER_cert(body.decode("ascii").strip())
    except (ValueError, UnicodeDecodeError) as error:
        raise ProtocolViolation(f"{join.hub_url} sent no certificate as its CA", code="protocol.ca") from error
    if not hmac.compare_digest(hashlib.sha256(der).hexdigest(), join.ca_fingerprint):
        raise TrustError(
            f"the hub at {join.hub_url} is not the one that made this token: its CA has another fingerprint",
            code="trust.ca_fingerprint",
            hint="somebody may be in between, or the hub was set up anew; ask for a new token",
        )
    return ssl.DER_cert_to_PEM_cert(der)


def _ask(join: JoinToken, ca_pem: str, *, body: dict[str, str | None]) -> _Enrolled:
    """Send token and request over a connection that the pinned CA vouches for."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(cadata=ca_pem)
    status, data = _exchange(join.hub_url, context, method="POST", path="/v1/enroll", body=msgspec.json.encode(body))
    if status != 201:
        raise _refusal(join.hub_url, status, data)
    try:
        return msgspec.json.decode(data, type=_Enrolled)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolViolation(
            f"the hub's answer does not parse: {error}", code="protocol.enrolment", hint="update the agent"
        ) from error


def _refusal(hub_url: str, status: int, data: bytes) -> OutriderError:
    try:
        problem = msgspec.json.decode(data, type=_Problem)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        problem = _Problem()
    message = f"the hub at {hub_url} refused: {problem.detail or f'HTTP {status}'}"
    hint = problem.hint or "ask for a new token: `outrider-hub token create --kind join`"
    if status == 429 or status >= 500:
        return Unreachable(message, code=problem.code or None, hint=problem.hint or "try again later")
    return TransferRefused(message, code=problem.code or None, hint=hint)


def _exchange(
    hub_url: str, context: ssl.SSLContext, *, method: str, path: str, body: bytes | None
) -> tuple[int, bytes]:
    host, port = check_hub_url(hub_url)
    connection = http.client.HTTPSConnection(host, port, context=context, timeout=TIMEOUT_S)
    may_be_spent = False
    try:
        connection.connect()
        may_be_spent = method == "POST"
        headers = {"Content-Type": "application/json"} if body is not None else {}
        connection.request(method, path, body=body, headers=headers)
        with connection.getresponse() as response:
            status, data = response.status, response.read(MAX_ANSWER_BYTES + 1)
    except ssl.SSLCertVerificationError as error:
        raise TrustError(
            f"the hub at {hub_url} does not hold a certificate of its own CA for {host}: {error.verify_message}",
            code="trust.hub_certificate",
            hint="use the name or address that the hub was set up with, and check this machine's clock",
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise Unreachable(
            f"the hub at {hub_url} cannot be reached: {str(error) or type(error).__name__}",
            hint=_LOST_ANSWER if may_be_spent else _NOT_SPENT,
        ) from error
    finally:
        connection.close()
    if len(data) > MAX_ANSWER_BYTES:
        raise ProtocolViolation(f"the hub's answer exceeds {MAX_ANSWER_BYTES} bytes", code="protocol.too_large")
    return status, data


_NOT_SPENT: Final = "check the address, the network and that `outrider-hub serve` is running; the token is not spent"
_LOST_ANSWER: Final = "the hub may have taken the token already: try again, and ask for a new one if it is spent"


def _new_key(path: Path) -> str:
    """Make a P-256 key in this file, which nobody else can read, and return a certificate request for it."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    with _translated(path):
        path.unlink(missing_ok=True)  # of an attempt that ended before the hub had signed
    _write(path, pem, mode=0o600)
    # The subject is the hub's to decide; whatever stood here would be ignored.
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM).decode()


def _check(answer: _Enrolled, *, csr_pem: str, ca_pem: str) -> int:
    """Hold the answer against what was asked; returns when the certificate begins to be valid.

    Raises TrustError or ProtocolViolation.
    """
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import serialization

    try:
        parse_device_id(answer.device)
        check_hub_url(answer.hub_url)
        certificate = x509.load_pem_x509_certificate(answer.certificate_pem.encode())
        certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(ca_pem.encode()))
        names = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    except (ValueError, TypeError, InvalidSignature, InvalidValue) as error:
        raise TrustError(
            f"the hub's answer does not hold: {error or 'the certificate is not signed by its CA'}",
            code="trust.malformed",
            hint="report this to the hub's operator; nothing was changed on this device",
        ) from error
    form = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    asked = x509.load_pem_x509_csr(csr_pem.encode()).public_key().public_bytes(*form)
    if [name.value for name in names] != [answer.device] or certificate.public_key().public_bytes(*form) != asked:
        raise TrustError(
            "the hub's certificate is for another key or another name",
            code="trust.wrong_device",
            hint="report this to the hub's operator; nothing was changed on this device",
        )
    if not answer.broker.host or not 0 < answer.broker.port < 65536 or not answer.root.lstrip().startswith("{"):
        raise ProtocolViolation("the hub's answer lacks the broker or the root metadata", code="protocol.enrolment")
    return int(certificate.not_valid_before_utc.timestamp()) * 1000


def _stage(folder: Path, answer: _Enrolled, *, ca_pem: str, profile: str, at_ms: int, issued_ms: int) -> None:
    """Write everything beside what counts now; a disk that fills up here has changed nothing yet."""
    identity = IdentityFile(
        device=answer.device,
        hub_url=answer.hub_url,
        broker_host=answer.broker.host,
        broker_port=answer.broker.port,
        profile=profile,
        enrolled_ms=at_ms,
        issued_ms=issued_ms,
    )
    contents = {
        "device.pem": answer.certificate_pem.encode(),
        "ca.pem": ca_pem.encode(),
        "root.json": answer.root.encode(),
        "identity.json": msgspec.json.format(msgspec.json.encode(identity), indent=1),
    }
    for name, data in contents.items():
        path = folder / f"{name}.new"
        with _translated(path):
            path.unlink(missing_ok=True)
        _write(path, data, mode=0o600)


def _set_aside(
    state_dir: Path, before: Identity | None, answer: _Enrolled, *, ca_pem: str, at_ms: int
) -> tuple[Path, ...]:
    """Move away what another identity left; floors of another hub would refuse everything that this one signs."""
    if before is not None and before.device == answer.device and before.ca_path.read_text("ascii") == ca_pem:
        if (state_dir / DATABASE_NAME).exists():
            # A file that is damaged as a whole is moved aside at the next start, and the floors are lost from then on.
            with contextlib.suppress(StorageError):
                forget_lost_floors(state_dir / DATABASE_NAME)
        return ()
    moved = []
    for name in (DATABASE_NAME, f"{DATABASE_NAME}-wal", f"{DATABASE_NAME}-shm", TRUST_DIR):
        path = state_dir / name
        aside = path.with_name(f"{name}.before-{at_ms}")
        with _translated(path):
            if path.exists():
                path.rename(aside)
                moved.append(aside)
    return tuple(moved)


def _swap(state_dir: Path) -> None:
    """Make the staged files count: nothing is enrolled while this is under way, and all is when it is done."""
    folder, trust = state_dir / IDENTITY_DIR, state_dir / TRUST_DIR
    _make_folder(trust)
    with _translated(folder):
        (folder / "identity.json").unlink(missing_ok=True)
        _sync(folder)
        for name in ("device.key", "device.pem", "ca.pem"):
            (folder / f"{name}.new").rename(folder / name)
        (folder / "root.json.new").rename(trust / "root.json")
        for place in (trust, state_dir, folder):
            _sync(place)
        (folder / "identity.json.new").rename(folder / "identity.json")
        _sync(folder)


def _write(path: Path, data: bytes, *, mode: int) -> None:
    with _translated(path):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(fd, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _make_folder(path: Path) -> None:
    with _translated(path):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)


class _translated(contextlib.AbstractContextManager[None]):
    """Turns an OSError into a StorageError that names the path."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise StorageError(
                f"{self._path}: {error.strerror}",
                code="storage.state_dir",
                hint="run the command as the user that runs the agent, or choose another --state",
            ) from error
