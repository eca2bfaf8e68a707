"""One name in two places at once: decided from births alone, in pure code.

A device counts its boots on its disk and the connects of each boot, and says one birth for each connect. Births may
come late, twice, and in another order. What cannot come from one device, whatever the delivery did:

1. Two different births of one connect: same store (`epoch`), boot and session, but not the same message. Copies of one
   disk do this at once, because both count on from the same number.
2. Two lines of births (a line is a boot of a store) that overtake each other again and again. One device ends a line
   before it begins the next, so births of the first come behind births of the second only if they are late. Each of
   both coming behind more than LATE_BIRTHS of the other means that both go on.

A birth is taken to be late behind at most LATE_BIRTHS that were said after it. A broker keeps the order of each client,
and a hub that comes back is sent again what it had not settled: in practice none comes behind another, except twice.

A device whose disk is set back to an older copy within the window looks like a clone of itself (by 1), and is none.

Not here: what follows, and that the broker pushes each of two clients out when the other comes in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

WINDOW_MS: Final = 30 * 60 * 1000
"""Births older than this say nothing."""
MAX_KEPT: Final = 64
"""Births of a device that are looked at."""
LATE_BIRTHS: Final = 4


@dataclass(frozen=True, slots=True)
class SeenBirth:
    """A birth that arrived.

    Attributes:
        epoch, boot, session: as the device says them.
        message: what tells one message from another: its id and the device's clocks in the envelope.
        at_ms: the hub's clock when it arrived.
    """

    epoch: str
    boot: int
    session: int
    message: str
    at_ms: int

    @property
    def line(self) -> tuple[str, int]:
        """The run of the agent that it is of."""
        return (self.epoch, self.boot)


def note_birth(seen: tuple[SeenBirth, ...], birth: SeenBirth) -> tuple[tuple[SeenBirth, ...], str]:
    """What is kept after a birth, and why two devices must have the name; empty while one device explains it all.

    Args:
        seen: what was kept of this device's births, in the order of arrival.
    """
    recent = tuple(one for one in seen if 0 <= birth.at_ms - one.at_ms < WINDOW_MS)
    same = [one for one in recent if one.line == birth.line and one.session == birth.session]
    if any(one.message == birth.message for one in same):
        return recent, ""
    kept = (*recent, birth)[-MAX_KEPT:]
    if same:
        return kept, f"two births of boot {birth.boot}, session {birth.session}"
    for line in {one.line for one in recent} - {birth.line}:
        if _behind(kept, birth.line, line) > LATE_BIRTHS and _behind(kept, line, birth.line) > LATE_BIRTHS:
            return kept, f"boots {birth.boot} and {line[1]} take turns"
    return kept, ""


def _behind(births: tuple[SeenBirth, ...], line: tuple[str, int], other: tuple[str, int]) -> int:
    """Behind how many births of another line the last birth of a line has come."""
    last = max(place for place, one in enumerate(births) if one.line == line)
    return sum(one.line == other for one in births[:last])
