"""The authorities that are trusted now: one that issues, and a second one while the hub changes its CA.

    steady      one CA
    begun       the old one issues; the next one is trusted beside it, so that devices learn it as they renew
    switched    the new one issues; the old one is trusted until the last device has a certificate of the new one

Values and bytes only: `transport.py` keeps them in files. What changes while the hub runs is held in one place,
`Authorities`, which rooms are given instead of a CA.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from cloud_hub.ground.ca import Authority, DeviceCertificate, IssuedPair, ShownCertificate
from shared.ids import DeviceId

Phase: TypeAlias = Literal["steady", "begun", "switched"]
Stamp: TypeAlias = tuple[tuple[str, int, int], ...]
"""What changes whenever the files of the authorities do (`rotation.stamp`)."""


@dataclass(frozen=True, slots=True)
class TrustedPair:
    """The CA that issues, and the other one during a change.

    Attributes:
        link: the old one's word that the new one follows it, PEM; only after the switch.
        stamp: of the files, from before they were read: another one later says that they have to be read again.
    """

    phase: Phase
    issuing: Authority
    other: Authority | None = None
    link: str = ""
    stamp: Stamp = ()

    @property
    def all(self) -> tuple[Authority, ...]:
        """Both, or the one; the one that issues first."""
        return (self.issuing,) if self.other is None else (self.issuing, self.other)


class Authorities:
    """What rooms ask to issue and to check; follows a change of the CA.

    Args:
        issuing: the CA to begin with.
        require_time: raises ConfigError when a reading of the clock is nothing that a device should keep.
    """

    def __init__(self, issuing: Authority, *, require_time: Callable[[int], None] = lambda _: None) -> None:
        self.now = TrustedPair(phase="steady", issuing=issuing)
        self.require_time = require_time

    def adopt(self, pair: TrustedPair) -> None:
        """Go on with these."""
        self.now = pair

    @property
    def pem(self) -> str:
        """All that are trusted, for devices."""
        return "".join(authority.pem for authority in self.now.all)

    @property
    def published(self) -> str:
        """The same and the link between them, for whoever has pinned the old one."""
        return self.pem + self.now.link

    @property
    def fingerprint(self) -> str:
        """Of the one that issues."""
        return self.now.issuing.fingerprint

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """Of all that are trusted."""
        return tuple(authority.fingerprint for authority in self.now.all)

    @property
    def expires_ms(self) -> int:
        """When the one that issues ends."""
        return self.now.issuing.expires_ms

    def issue_server(self, names: Sequence[str], *, now_ms: int, days: float) -> IssuedPair:
        """As `Authority.issue_server`."""
        return self.now.issuing.issue_server(names, now_ms=now_ms, days=days)

    def issue_client(self, name: str, *, now_ms: int, days: float) -> IssuedPair:
        """As `Authority.issue_client`."""
        return self.now.issuing.issue_client(name, now_ms=now_ms, days=days)

    def issue_device(self, csr_pem: str, *, device: DeviceId, now_ms: int, days: float) -> DeviceCertificate:
        """As `Authority.issue_device`; raises ConfigError when the clock is doubted (`walltime.py`)."""
        self.require_time(now_ms)
        return self.now.issuing.issue_device(csr_pem, device=device, now_ms=now_ms, days=days)

    def check_client(self, der: bytes, *, now_ms: int) -> ShownCertificate | None:
        """As `Authority.check_client`, for any that is trusted."""
        found = (authority.check_client(der, now_ms=now_ms) for authority in self.now.all)
        return next((peer for peer in found if peer is not None), None)

    def examine(self, der: bytes) -> ShownCertificate | None:
        """As `Authority.examine`, for any that is trusted."""
        found = (authority.examine(der) for authority in self.now.all)
        return next((shown for shown in found if shown is not None), None)
