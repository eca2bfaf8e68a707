"""What time it is on a device whose own clock nobody may trust.

Rules of this file:
1. Until the hub has attested the time in this boot, it is the system clock, but never earlier than what is known to
   have passed: what signed documents prove (the agent's own build, its certificate, assignments) and what was attested
   in an earlier boot.
2. Once attested, it is that time plus what the boot clock has run since, suspends included, whatever the system clock
   says. It counts from the moment of asking, so that an answer that is held back on the way cannot make it late.
3. A later attestation, which answers a fresh nonce, may set it back, but never below what signed documents prove.

Not here: whose word counts (shared/trust/time.py, in the verifier child), asking (edge_agent/driver/timekeeping.py).
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec
from msgspec.structs import replace

from edge_agent.core import backoff
from shared.release import Floors

BUILT_MS: Final = 1_793_491_200_000
"""2026-11-01: no device that runs this code lives earlier. Raised with each release."""

FIRST_PAUSE_MS: Final = 1_000
LONGEST_PAUSE_MS: Final = 300_000
WRONG_CLOCK_MS: Final = 300_000
"""How far the system clock may be off before it is worth a word."""

MOVED_MS: Final = 60_000
"""By how much the time must move before what was decided by the former one is decided anew."""
AGAIN_MS: Final = 60_000
"""How long a hub that has told the time is left in peace, however often somebody doubts it."""

WRONG_DATES: Final = "transfer.certificate_dates"
"""The code of a server certificate that is not valid at the trusted time: one of the two is wrong."""

BY_THE_TIME: Final = frozenset({"trust.freeze", "trust.issued_ahead"})
"""Codes of what has expired or lies ahead by the trusted time: somebody holds the new back, or the time is wrong."""

Basis = Literal["attested", "floor", "clock"]
"""On what the time rests: the hub's attestation in this boot; what has passed at least; the system clock alone."""


class TrustedTime(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of the time.

    Attributes:
        floor_ms: what signed documents prove to have passed; only rises.
        remembered_ms: what the hub attested last in an earlier boot; 0 for never.
        attested_ms: what it attested in this boot, None before it did.
        asked_boot_ms: the boot clock when it was asked for that.
    """

    floor_ms: int = BUILT_MS
    remembered_ms: int = 0
    attested_ms: int | None = None
    asked_boot_ms: int = 0

    @property
    def attested(self) -> bool:
        """Whether the hub has attested the time in this boot."""
        return self.attested_ms is not None


def at_start(floors: Floors, *, issued_ms: int) -> TrustedTime:
    """What is known before anybody was asked; `issued_ms` is when the device's certificate begins to be valid."""
    return TrustedTime(floor_ms=max(BUILT_MS, issued_ms, floors.time_ms), remembered_ms=floors.attested_ms)


def proven(time: TrustedTime, floor_ms: int) -> TrustedTime:
    """A signed document proves that this moment has passed."""
    return replace(time, floor_ms=max(time.floor_ms, floor_ms))


def attested(time: TrustedTime, time_ms: int, *, asked_boot_ms: int) -> TrustedTime:
    """The hub has attested this time, to a question that was asked at that moment of the boot clock."""
    return replace(time, attested_ms=max(time_ms, time.floor_ms), asked_boot_ms=asked_boot_ms)


def is_news(before: TrustedTime, after: TrustedTime, *, wall_ms: int, boot_ms: int) -> bool:
    """Whether an attestation is a reason to try again what failed before it: the first one, or another time."""
    clocks = {"wall_ms": wall_ms, "boot_ms": boot_ms}
    return not before.attested or abs(now_ms(after, **clocks) - now_ms(before, **clocks)) > MOVED_MS


def now_ms(time: TrustedTime, *, wall_ms: int, boot_ms: int) -> int:
    """The time by which expiry, certificates and releases are judged, in milliseconds since 1970."""
    if time.attested_ms is None:
        return max(wall_ms, time.floor_ms, time.remembered_ms)
    return max(time.attested_ms + max(0, boot_ms - time.asked_boot_ms), time.floor_ms)


def basis(time: TrustedTime, *, wall_ms: int) -> Basis:
    """On what `now_ms` rests."""
    if time.attested:
        return "attested"
    return "floor" if wall_ms < max(time.floor_ms, time.remembered_ms) else "clock"


def pause_ms(failures: int, *, jitter: float) -> int:
    """How long to wait after so many questions in a row that brought no time."""
    window_ms = backoff.doubled_ms(2 * FIRST_PAUSE_MS, times=failures - 1, longest_ms=LONGEST_PAUSE_MS)
    return backoff.drawn_ms(window_ms, jitter=jitter, shortest_ms=FIRST_PAUSE_MS)
