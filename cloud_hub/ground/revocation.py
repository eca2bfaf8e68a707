"""What the broker reads to keep a device out: the revocation list (RFC 5280, section 5) and the access list.

Rules:
1. Both files are written whole, each time, from what the database says; they hold nothing of their own.
2. A list lives 30 days and is made anew every day: an expired one keeps the whole fleet out.
3. Each list begins later than the one before, by a second at least. A broker that reloads keeps the old lists beside
   the new one, and OpenSSL takes the one that begins last: of two that begin in the same second it takes the old one.
4. No list begins in the future, where it would keep everybody out: they are dated back an hour, because clocks differ.
5. The access list carries the list's number as a topic that nobody may write to (`mark`). A broker that refuses that
   topic has loaded both files.

Not here: who is revoked (the devices room), and that the broker reads the files (access.py).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509

from cloud_hub.ground import folder as files
from cloud_hub.ground.authorities import Authorities
from cloud_hub.ground.ca import BACKDATE, Authority
from shared.clock import Clock
from shared.ids import DeviceId
from shared.wire import topics

LIST_LIFE: Final = timedelta(days=30)
RENEW_MS: Final = 24 * 3600 * 1000
LIST_NAME: Final = "crl.pem"
ACCESS_NAME: Final = "acl"


@dataclass(frozen=True, slots=True)
class RevokedCertificate:
    """A line of a list: the fingerprint of the CA that signed the certificate, its serial number, and since when."""

    authority: str
    serial: int
    revoked_ms: int


@dataclass(frozen=True, slots=True)
class ListState:
    """From when to when the lists in a file hold: the latest begin, the earliest end, and how many lines they have.

    `authorities` are the key identifiers of the CAs that have a list there.
    """

    began_ms: int
    expires_ms: int
    certificates: int
    authorities: frozenset[bytes] = frozenset()

    def has_all(self, trusted: Sequence[Authority]) -> bool:
        """Whether each of these CAs has a list; one that is trusted and has none locks its devices out."""
        return self.authorities >= {authority.key_identifier for authority in trusted}

    @property
    def made_ms(self) -> int:
        """When they were made: they are dated back."""
        return self.began_ms + int(BACKDATE.total_seconds()) * 1000


def make_list(
    authority: Authority, revoked: Collection[RevokedCertificate], *, now_ms: int, after_ms: int | None
) -> bytes:
    """The list of one CA, PEM: those of these certificates that it signed.

    Args:
        after_ms: when the newest list before began, None for the first.
    """
    begins = begin_after(after_ms, now_ms=now_ms)
    builder = (
        x509.CertificateRevocationListBuilder()
        .last_update(begins)
        .next_update(_to_time(now_ms) + LIST_LIFE)
        .add_extension(x509.CRLNumber(int(begins.timestamp())), critical=False)
    )
    for one in revoked:
        if one.authority == authority.fingerprint:
            line = x509.RevokedCertificateBuilder().serial_number(one.serial)
            builder = builder.add_revoked_certificate(line.revocation_date(_to_time(one.revoked_ms)).build())
    return authority.sign_list(builder)


def begin_after(after_ms: int | None, *, now_ms: int) -> datetime:
    """When the next list begins: an hour ago, or a second after the one before, but never in the future.

    A list before that lies in the future is not valid now, and no broker takes it when there is one that is.
    """
    usual = _to_time(now_ms) - BACKDATE
    if after_ms is None:
        return usual
    following = max(usual, _to_time(after_ms) + timedelta(seconds=1))
    return following if following <= _to_time(now_ms) else usual


def read_state(path: Path) -> ListState | None:
    """From when to when the lists in this file hold; None when there is no file, or one that is no list."""
    try:
        lists = [x509.load_pem_x509_crl(text) for text in _split(path.read_bytes())]
    except (OSError, ValueError):
        return None
    ends = [one.next_update_utc for one in lists if one.next_update_utc is not None]
    if not lists or len(ends) != len(lists):
        return None
    return ListState(
        began_ms=max(_to_ms(one.last_update_utc) for one in lists),
        expires_ms=min(map(_to_ms, ends)),
        certificates=sum(len(one) for one in lists),
        authorities=frozenset(_key_identifier(one) for one in lists),
    )


def access_list(hub_name: str, *, denied: Collection[DeviceId] = (), mark: str = "") -> str:
    """The text of the access list: the hub has the tree, a device its own two branches, who is denied nothing at all.

    A device's own certificate names it, so `user` is a line of that certificate's and of no other's.
    """
    write, read = topics.acl_patterns()
    lines = [f"user {hub_name}", f"topic readwrite {topics.ROOT}/#", ""]
    for device in sorted(denied):
        lines += [f"user {device}", "topic deny #", ""]
    if mark:
        lines.append(f"pattern deny {write.removesuffix('#')}{mark}")
    return "\n".join([*lines, f"pattern write {write}", f"pattern read {read}", ""])


class AccessLists:
    """The two files.

    Args:
        folder: the broker's.
        authorities: the CAs that the broker trusts, now; each has a list in the file.
        hub_name: as whom the hub comes in at the broker.
        clock: for the lists' times.
    """

    def __init__(self, folder: Path, *, authorities: Authorities, hub_name: str, clock: Clock) -> None:
        self._list, self._access = folder / LIST_NAME, folder / ACCESS_NAME
        self._authorities = authorities
        self._hub_name = hub_name
        self._clock = clock

    def state(self) -> ListState | None:
        """What the list on the disk is; None when there is none."""
        return read_state(self._list)

    def is_due(self) -> bool:
        """Whether a list on the disk is a day old, from a clock that was ahead, or missing."""
        state, now_ms = self.state(), self._clock.wall_ms()
        if state is None or not state.has_all(self._authorities.now.all):
            return True
        return not state.made_ms <= now_ms + RENEW_MS // 2 or now_ms - state.made_ms >= RENEW_MS

    def write(self, *, revoked: Collection[RevokedCertificate], denied: Collection[DeviceId]) -> str:
        """Write both files and return the mark of the new access list; raises StorageError."""
        before, now_ms = self.state(), self._clock.wall_ms()
        after_ms = None if before is None else before.began_ms
        lists = [make_list(one, revoked, now_ms=now_ms, after_ms=after_ms) for one in self._authorities.now.all]
        mark = f"list-{int(begin_after(after_ms, now_ms=now_ms).timestamp())}"
        files.write(self._list, b"".join(lists))
        files.write(self._access, access_list(self._hub_name, denied=denied, mark=mark).encode())
        return mark


def ensure_lists(folder: Path, trusted: Sequence[Authority], *, now_ms: int) -> None:
    """Add an empty list for each CA that has none: a broker does not start without the file that it was told of.

    What belongs onto it is added by whoever has the database, before the broker is told.
    """
    path = folder / LIST_NAME
    state = read_state(path)
    known = frozenset() if state is None else state.authorities
    missing = [authority for authority in trusted if authority.key_identifier not in known]
    if missing:
        before = b"" if state is None else path.read_bytes()
        after_ms = None if state is None else state.began_ms
        made = [make_list(authority, (), now_ms=now_ms, after_ms=after_ms) for authority in missing]
        files.write(path, b"".join([before, *made]))


def _key_identifier(one: x509.CertificateRevocationList) -> bytes:
    try:
        found = one.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
    except (ValueError, x509.ExtensionNotFound):
        return b""
    return found or b""


def _split(data: bytes) -> list[bytes]:
    end = b"-----END X509 CRL-----"
    return [part + end for part in data.split(end)[:-1]]


def _to_time(ms: int) -> datetime:
    return datetime.fromtimestamp(ms // 1000, UTC)


def _to_ms(moment: datetime) -> int:
    return int(moment.timestamp()) * 1000
