"""The degradation ladder of a model family: full, cached, refuse; the cloud stands beside it.

    state = LADDER.decide(state, situation(…)).state       at each request
    choice = choose(state, …)                              what answers it, and why not something better

Rules of this file:
1. FULL: the model answers. CACHED: the model gets no new request, because its host is gone or too many wait; what was
   answered before is answered again. REFUSE: no release is there at all, so nothing can have been kept for it.
2. Hysteresis: at CROWDED waiting requests the ladder goes down, and it comes back up only at CALM. A host that came
   back has passed its golden check and is used at once.
3. An answer says `cached` only where it came from the cache because the model could not have given it: its host was
   gone, too many waited, or too little time was left. A hit that merely saved the work says `full`, and its reason
   tells that it was kept.
4. The hub's larger model is asked for what a lower step cannot answer, where the policy and the link allow it.

CROWDED leaves a quarter of the door's places to what needs no model: kept answers, feedback, status.

Not here: heat, memory and battery (they join with the device's health), and the hub's own limits (cascade.py).
"""

from __future__ import annotations

from enum import Enum
from typing import Final

import msgspec

from shared.inference import Rung
from shared.limits import MAX_WAITING_REQUESTS
from shared.machine import Decision, Row, Table

CROWDED: Final = MAX_WAITING_REQUESTS * 3 // 4
CALM: Final = MAX_WAITING_REQUESTS // 2


class Step(Enum):
    """The best rung that is offered now."""

    FULL = "full"
    CACHED = "cached"
    REFUSE = "refuse"


class Ladder(msgspec.Struct, frozen=True):
    """`crowded` tells which of its two reasons CACHED has."""

    step: Step = Step.FULL
    crowded: bool = False

    @property
    def most_waiting(self) -> int:
        """How many requests may wait for the model before another one is refused."""
        return CALM if self.crowded else CROWDED


class Calm(msgspec.Struct, frozen=True):
    """The host is up and few requests wait."""


class Busy(msgspec.Struct, frozen=True):
    """The host is up; between CALM and CROWDED."""


class Crowded(msgspec.Struct, frozen=True):
    """The host is up; too many wait."""


class HostGone(msgspec.Struct, frozen=True):
    """A release is there, but its host is not up."""


class NothingLoaded(msgspec.Struct, frozen=True):
    """No release answers for this family."""


Situation = Calm | Busy | Crowded | HostGone | NothingLoaded


def situation(*, loaded: bool, up: bool, waiting: int) -> Situation:
    """What is the case now."""
    if not loaded:
        return NothingLoaded()
    if not up:
        return HostGone()
    if waiting >= CROWDED:
        return Crowded()
    return Busy() if waiting >= CALM else Calm()


def _to(ladder: Ladder) -> Row[Step, Ladder, None]:
    return Row((ladder.step,), lambda _ladder, _situation: Decision(ladder))


def _linger(ladder: Ladder, _: Busy) -> Decision[Ladder, None]:
    return Decision(ladder if ladder.crowded else Ladder())


_F, _C, _R = Step.FULL, Step.CACHED, Step.REFUSE
_AT_WORK, _FULL_HOUSE, _HOSTLESS, _EMPTY = Ladder(), Ladder(_C, crowded=True), Ladder(_C), Ladder(_R)

LADDER: Final[Table[Step, Ladder, Situation, None]] = Table(
    "ladder",
    phase_of=lambda ladder: ladder.step,
    rows={
        (_F, Calm): _to(_AT_WORK),
        (_F, Busy): _to(_AT_WORK),
        (_F, Crowded): _to(_FULL_HOUSE),
        (_F, HostGone): _to(_HOSTLESS),
        (_F, NothingLoaded): _to(_EMPTY),
        (_C, Calm): _to(_AT_WORK),
        # Down because too many waited: still too many to come back up.
        (_C, Busy): Row((_F, _C), _linger),
        (_C, Crowded): _to(_FULL_HOUSE),
        (_C, HostGone): _to(_HOSTLESS),
        (_C, NothingLoaded): _to(_EMPTY),
        (_R, Calm): _to(_AT_WORK),
        (_R, Busy): _to(_AT_WORK),
        (_R, Crowded): _to(_FULL_HOUSE),
        (_R, HostGone): _to(_HOSTLESS),
        (_R, NothingLoaded): _to(_EMPTY),
    },
)


class Choice(msgspec.Struct, frozen=True):
    """What answers: the rung, whether out of the cache, and the reason that the answer carries."""

    rung: Rung
    kept: bool = False
    reason: str = ""


def choose(
    ladder: Ladder, *, hit: bool, cloud: bool, why: str = "", left_ms: float = 0.0, expected_ms: float = 0.0
) -> Choice:
    """What answers a request.

    Args:
        hit: whether the cache holds its answer.
        cloud: whether the hub's larger model stands behind this family.
        why: in words, why the model cannot answer; below FULL only.
        left_ms, expected_ms: time to the deadline, and what the model takes.
    """
    if ladder.step is Step.FULL:
        if not hit:
            return Choice("full")
        if expected_ms > left_ms:
            hurry = f"{left_ms:.0f} ms are left, the model takes about {expected_ms:.0f} ms"
            return Choice("cached", kept=True, reason=hurry)
        return Choice("full", kept=True, reason="kept from the same request before")
    if hit and ladder.step is Step.CACHED:
        return Choice("cached", kept=True, reason=why)
    return Choice("cloud" if cloud else "refused", reason=why)
