"""The certificates of the hub's two ports and of its link to the broker: made, and made anew in time.

A pair is issued again when it is missing, does not fit together, has less than a third of its life left, or does not
carry the names that are configured now. Each file is replaced in one step; a crash between key and certificate leaves
a pair that does not fit, and the next start issues it again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from cloud_hub.ground import folder as files
from cloud_hub.ground.ca import Authority, IssuedPair, common_name, needs_renewal, subject_hash
from cloud_hub.ground.folder import DataFolder
from cloud_hub.ground.revocation import ensure_lists


def load_authority(folder: DataFolder) -> Authority:
    """The CA from its files; raises ConfigError."""
    return Authority(files.read(folder.ca_certificate), files.read(folder.ca_key))


def ensure(
    folder: DataFolder,
    authority: Authority,
    *,
    names: Sequence[str],
    broker_names: Sequence[str],
    hub_name: str,
    now_ms: int,
    days: int,
    other: Authority | None = None,
) -> tuple[str, ...]:
    """Issue what needs it; returns what was issued, as paths below the data directory.

    Args:
        folder, authority: where to, and by whom.
        other: a second CA whose certificates are taken, during a change.
        names, broker_names: in the certificates of the HTTPS port and of the managed broker.
        hub_name: as whom the hub comes in at the broker.
        now_ms, days: from when on, and for how long.
    """
    # A copy of a hub's directory may come without those of its certificates.
    folder.make()
    issued: list[str] = []

    def pair(
        certificate: Path, key: Path, *, wanted: Sequence[str], make: Callable[[], IssuedPair], owner: str = ""
    ) -> None:
        if _is_good(certificate, key, authority, names=wanted, owner=owner, now_ms=now_ms):
            return
        made = make()
        files.write(key, made.key_pem)
        files.write(certificate, made.certificate_pem)
        issued.append(str(certificate.relative_to(folder.root)))

    pair(
        folder.server_certificate,
        folder.server_key,
        wanted=names,
        make=lambda: authority.issue_server(names, now_ms=now_ms, days=days),
    )
    pair(
        folder.broker / "server.pem",
        folder.broker / "server.key",
        wanted=broker_names,
        make=lambda: authority.issue_server(broker_names, now_ms=now_ms, days=days),
    )
    pair(
        folder.broker / "hub.pem",
        folder.broker / "hub.key",
        wanted=(),
        owner=hub_name,
        make=lambda: authority.issue_client(hub_name, now_ms=now_ms, days=days),
    )
    trusted = (authority,) if other is None else (authority, other)
    # First: to trust a CA that has no list is to lock all its devices out.
    ensure_lists(folder.broker, trusted, now_ms=now_ms)
    _tell_trust(folder, trusted)
    return tuple(issued)


def _tell_trust(folder: DataFolder, trusted: Sequence[Authority]) -> None:
    """Write who is trusted: one file for the ports, and a directory for the broker.

    mosquitto reads its file of CAs only when it starts; in a directory OpenSSL looks for one when it needs it, so that
    a second CA is taken without a restart (mosquitto.conf(5), capath). To forget one takes a restart.
    """
    bundle = "".join(authority.pem for authority in trusted).encode()
    ca = folder.broker / "ca.pem"
    if not ca.is_file() or ca.read_bytes() != bundle:
        files.write(ca, bundle)
    directory = folder.broker / "cas"
    directory.mkdir(mode=0o700, exist_ok=True)
    wanted = {f"{subject_hash(authority.pem)}.{number}": authority for number, authority in _numbered(trusted)}
    for path in directory.iterdir():
        if path.name not in wanted:
            path.unlink(missing_ok=True)
    for name, authority in wanted.items():
        path = directory / name
        if not path.is_file() or path.read_text() != authority.pem:
            files.write(path, authority.pem.encode())


def _numbered(trusted: Sequence[Authority]) -> list[tuple[int, Authority]]:
    """CAs of the same name are told apart by a number."""
    hashes = [subject_hash(authority.pem) for authority in trusted]
    return [(hashes[:index].count(hashes[index]), authority) for index, authority in enumerate(trusted)]


def _is_good(
    certificate: Path, key: Path, authority: Authority, *, names: Sequence[str], owner: str, now_ms: int
) -> bool:
    try:
        pem = certificate.read_bytes()
        private = serialization.load_pem_private_key(key.read_bytes(), password=None)
        fits = x509.load_pem_x509_certificate(pem).public_key() == private.public_key()
    except (OSError, ValueError, TypeError):
        return False
    is_theirs = not owner or common_name(pem) == owner
    return fits and is_theirs and authority.has_signed(pem) and not needs_renewal(pem, names=names, now_ms=now_ms)
