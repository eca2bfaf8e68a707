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
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from edge_agent import certificates, hub_call
from edge_agent.adapters.database import DATABASE_NAME, REPLACEMENT
from edge_agent.adapters.ledger import forget_lost_floors
from edge_agent.adapters.lock import AgentLock
from edge_agent.identity import IDENTITY_DIR, TRUST_DIR, Identity, IdentityFile, load_identity, sweep
from edge_agent.keeping import make_folder, sync, translated, write_anew
from shared.clock import Clock
from shared.errors import ConfigError, Conflict, ProtocolViolation, StorageError, TrustError
from shared.join import JoinToken, decode_join_token
from shared.trust.ca_links import fingerprints, vouched

_NOT_SPENT: Final = "check the address, the network and that `outrider-hub serve` is running; the token is not spent"


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
    make_folder(state_dir)
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
        make_folder(folder)
        with translated(folder):
            (folder / "device.key.new").unlink(missing_ok=True)  # of an attempt that ended before the hub had signed
        certificates.new_key(folder / "device.key.new")
        csr_pem = certificates.new_request(folder / "device.key.new")
        body = {"token": token.strip(), "csr_pem": csr_pem, "profile": profile, "name": name}
        answer = _ask(join, ca_pem, body=body, now_ms=clock.wall_ms())
        at_ms = clock.wall_ms()
        ca_pem, life = _check(answer, csr_pem=csr_pem, pinned=ca_pem, now_ms=at_ms)
        _stage(folder, answer, ca_pem=ca_pem, profile=profile, at_ms=at_ms, life=life)
        moved = _set_aside(state_dir, before, answer, ca_pem=ca_pem, at_ms=at_ms)
        _swap(state_dir)
    return Enrolment(identity=load_identity(state_dir), moved_aside=moved)


def _enrolled_before(state_dir: Path) -> Identity | None:
    try:
        return load_identity(state_dir)
    except ConfigError:
        return None


def _pinned_ca(join: JoinToken) -> str:
    """The hub's CAs that the token's fingerprint vouches for, as PEM; nothing secret is sent."""
    published = hub_call.fetch_ca(join.hub_url, unsent=_NOT_SPENT)
    try:
        found = vouched(published, pins=frozenset({join.ca_fingerprint}))
    except ValueError as error:
        raise ProtocolViolation(f"{join.hub_url} sent no certificate as its CA", code="protocol.ca") from error
    if not found:
        raise TrustError(
            f"the hub at {join.hub_url} is not the one that made this token: its CA has another fingerprint",
            code="trust.ca_fingerprint",
            hint="somebody may be in between, or the hub has changed its CA since; ask for a new token",
        )
    return found


def _ask(join: JoinToken, ca_pem: str, *, body: dict[str, str | None], now_ms: int) -> _Enrolled:
    """Send token and request over a connection that the pinned CA vouches for."""
    status, data = hub_call.exchange(
        join.hub_url,
        hub_call.trusting(ca_pem, now_ms=now_ms),
        method="POST",
        path="/v1/enroll",
        body=msgspec.json.encode(body),
        unsent=_NOT_SPENT,
        lost="the hub may have taken the token already: try again, and ask for a new one if it is spent",
    )
    if status != 201:
        hint = "ask for a new token: `outrider-hub token create --kind join`"
        raise hub_call.refusal(join.hub_url, status, data, hint=hint)
    try:
        return msgspec.json.decode(data, type=_Enrolled)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolViolation(
            f"the hub's answer does not parse: {error}", code="protocol.enrolment", hint="update the agent"
        ) from error


def _check(answer: _Enrolled, *, csr_pem: str, pinned: str, now_ms: int) -> tuple[str, certificates.Life]:
    """Hold the answer against what was asked; returns the CAs to trust and how long the certificate is good.

    The hub's list of CAs came over a connection that the pin vouches for, so it may name a second one.
    """
    ca_pem = certificates.check_bundle(answer.ca_pem)
    life = certificates.check_certificate(
        answer.certificate_pem,
        device=answer.device,
        hub_url=answer.hub_url,
        csr_pem=csr_pem,
        ca_pem=pinned,
        now_ms=now_ms,
        attested=False,
    )
    if not answer.broker.host or not 0 < answer.broker.port < 65536 or not answer.root.lstrip().startswith("{"):
        raise ProtocolViolation("the hub's answer lacks the broker or the root metadata", code="protocol.enrolment")
    return ca_pem, life


def _stage(folder: Path, answer: _Enrolled, *, ca_pem: str, profile: str, at_ms: int, life: certificates.Life) -> None:
    """Write everything beside what counts now; a disk that fills up here has changed nothing yet."""
    identity = IdentityFile(
        device=answer.device,
        hub_url=answer.hub_url,
        broker_host=answer.broker.host,
        broker_port=answer.broker.port,
        profile=profile,
        enrolled_ms=at_ms,
        not_before_ms=life.not_before_ms,
        not_after_ms=life.not_after_ms,
    )
    contents = {
        "device.pem": answer.certificate_pem.encode(),
        "ca.pem": ca_pem.encode(),
        "root.json": answer.root.encode(),
        "identity.json": msgspec.json.format(msgspec.json.encode(identity), indent=1),
    }
    for name, data in contents.items():
        write_anew(folder / f"{name}.new", data)


def _set_aside(
    state_dir: Path, before: Identity | None, answer: _Enrolled, *, ca_pem: str, at_ms: int
) -> tuple[Path, ...]:
    """Move away what another identity left; floors of another hub would refuse everything that this one signs."""
    if before is not None and before.device == answer.device and _have_one_in_common(before.ca_path, ca_pem):
        if (state_dir / DATABASE_NAME).exists():
            # A file that is damaged as a whole is moved aside at the next start, and the floors are lost from then on.
            with contextlib.suppress(StorageError):
                forget_lost_floors(state_dir / DATABASE_NAME)
        return ()
    moved = []
    database = (f"{DATABASE_NAME}{suffix}" for suffix in ("", "-wal", "-shm", REPLACEMENT))
    for name in (*database, TRUST_DIR):
        path = state_dir / name
        aside = path.with_name(f"{name}.before-{at_ms}")
        with translated(path):
            if path.exists():
                path.rename(aside)
                moved.append(aside)
    return tuple(moved)


def _have_one_in_common(former: Path, ca_pem: str) -> bool:
    """Whether it is the same hub: one that is changing its CA has two, and one of them is the former."""
    try:
        return not set(fingerprints(former.read_text("ascii"))).isdisjoint(fingerprints(ca_pem))
    except ValueError:
        return False


def _swap(state_dir: Path) -> None:
    """Make the staged files count: nothing is enrolled while this is under way, and all is when it is done."""
    folder, trust = state_dir / IDENTITY_DIR, state_dir / TRUST_DIR
    make_folder(trust)
    with translated(folder):
        (folder / "identity.json").unlink(missing_ok=True)
        sync(folder)
        for name in ("device.key", "device.pem", "ca.pem"):
            (folder / f"{name}.new").rename(folder / name)
        (folder / "root.json.new").rename(trust / "root.json")
        for place in (trust, state_dir, folder):
            sync(place)
        (folder / "identity.json.new").rename(folder / "identity.json")
        sync(folder)
        for name in ("next.key", "next.csr", "refusal.json"):
            (folder / name).unlink(missing_ok=True)
        sweep(folder, generation=0)
