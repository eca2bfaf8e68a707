"""When the device's certificate is renewed, and how long to wait after it did not work.

    decision = decide(renewal, event)      nothing is saved: the dates are in the identity's own file

Rules of this file:
1. A certificate is renewed at two thirds of its life, and up to a twelfth of it later: a fleet that was enrolled in one
   hour does not come back in one hour. One that has expired is renewed at once.
2. What fails by itself is tried again in windows that widen up to an hour, any moment of them (full jitter). What the
   hub has refused for good (`shared/renewal.py`) is asked again within six hours: a person may have changed it. So is
   a certificate whose dates cannot be: each question makes the hub sign one more, and it has a limit.
3. The trusted time jumps when the hub has told it, so that no wait is longer than an hour; each end of one looks at the
   clock again.
4. After a renewal there is a pause whatever the clock says: a clock that is years ahead must not make a storm.

There is one timer. Times are the trusted time, milliseconds since 1970; the driver reads it and draws the jitter.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

import msgspec
from msgspec.structs import replace

from edge_agent.core.backoff import doubled_ms, drawn_ms
from shared.machine import Decision, Row, Table
from shared.renewal import REFUSED_FOR_GOOD

WRONG_LIFE: Final = "trust.certificate_life"
"""The code of a new certificate that does not go with the trusted time: the hub's clock is wrong, or the time is."""

SELDOM: Final = REFUSED_FOR_GOOD | {WRONG_LIFE}
"""What is told to people, and asked again within `REFUSED_WINDOW_MS` only."""

LOOK_MS: Final = 3_600_000
FIRST_WINDOW_MS: Final = 60_000
LONGEST_WINDOW_MS: Final = 3_600_000
REFUSED_WINDOW_MS: Final = 6 * 3_600_000
SHORTEST_WAIT_MS: Final = 200


class Phase(Enum):
    """WAITING for the timer, or ASKING the hub."""

    WAITING = "waiting"
    ASKING = "asking"


class Renewal(msgspec.Struct, frozen=True, kw_only=True):
    """The certificate's dates; how much later than others it is renewed (0 to 1); what went wrong last, if it did."""

    phase: Phase = Phase.WAITING
    not_before_ms: int
    not_after_ms: int
    spread: float
    failures: int = 0
    code: str = ""
    message: str = ""
    hint: str = ""


class Looked(msgspec.Struct, frozen=True, kw_only=True):
    """The timer has ended, or the agent has started; it is `now_ms` now."""

    now_ms: int


class Renewed(msgspec.Struct, frozen=True, kw_only=True):
    """There is a new certificate, and it counts. `spread` is drawn from 0 to 1."""

    not_before_ms: int
    not_after_ms: int
    spread: float
    now_ms: int


class Failed(msgspec.Struct, frozen=True, kw_only=True):
    """There is none. `jitter` is drawn from 0 to 1."""

    code: str
    message: str
    hint: str
    jitter: float


RenewalEvent = Looked | Renewed | Failed


class Ask(msgspec.Struct, frozen=True):
    """Have it renewed; answered by Renewed or Failed."""


class Adopt(msgspec.Struct, frozen=True):
    """Use the new certificate for every connection from here on, and connect anew."""


class StartTimer(msgspec.Struct, frozen=True):
    """Say Looked after this time; replaces the one that runs."""

    delay_ms: int


class NoteRefusal(msgspec.Struct, frozen=True):
    """Tell people what the hub has refused."""

    code: str
    message: str


RenewalEffect = Ask | Adopt | StartTimer | NoteRefusal
_Step = Decision[Renewal, RenewalEffect]


def decide(renewal: Renewal, event: RenewalEvent) -> _Step:
    """The renewal after this event, and what to do."""
    return RENEWAL.decide(renewal, event)


def due_ms(renewal: Renewal) -> int:
    """When this certificate is to be renewed."""
    life_ms = _life_ms(renewal)
    return renewal.not_before_ms + life_ms * 2 // 3 + int(life_ms * min(max(renewal.spread, 0.0), 1.0)) // 12


def _life_ms(renewal: Renewal) -> int:
    return max(renewal.not_after_ms - renewal.not_before_ms, 0)


def _wait_ms(renewal: Renewal, *, now_ms: int) -> int:
    return min(max(due_ms(renewal) - now_ms, SHORTEST_WAIT_MS), LOOK_MS)


def _look(renewal: Renewal, event: Looked) -> _Step:
    if event.now_ms >= due_ms(renewal):
        return Decision(replace(renewal, phase=Phase.ASKING), (Ask(),))
    return Decision(renewal, (StartTimer(_wait_ms(renewal, now_ms=event.now_ms)),))


def _renewed(_: Renewal, event: Renewed) -> _Step:
    after = Renewal(not_before_ms=event.not_before_ms, not_after_ms=event.not_after_ms, spread=event.spread)
    pause_ms = min(LOOK_MS, max(_life_ms(after) // 6, SHORTEST_WAIT_MS))
    return Decision(after, (Adopt(), StartTimer(max(pause_ms, _wait_ms(after, now_ms=event.now_ms)))))


def _failed(renewal: Renewal, event: Failed) -> _Step:
    for_good = event.code in SELDOM
    # Of a life that is very short, a minute may be all that is left.
    longest_ms = min(LONGEST_WINDOW_MS, max(_life_ms(renewal) // 20, SHORTEST_WAIT_MS))
    window_ms = doubled_ms(min(FIRST_WINDOW_MS, longest_ms), times=renewal.failures, longest_ms=longest_ms)
    if for_good:
        window_ms = REFUSED_WINDOW_MS
    after = replace(
        renewal,
        phase=Phase.WAITING,
        failures=renewal.failures + 1,
        code=event.code,
        message=event.message,
        hint=event.hint,
    )
    timer = StartTimer(drawn_ms(window_ms, jitter=event.jitter, shortest_ms=SHORTEST_WAIT_MS))
    if for_good and event.code != renewal.code:
        return Decision(after, (timer, NoteRefusal(event.code, event.message)))
    return Decision(after, (timer,))


def _stay(renewal: Renewal, _: RenewalEvent) -> _Step:
    return Decision(renewal)


_WAIT, _ASK = Phase.WAITING, Phase.ASKING

RENEWAL: Final[Table[Phase, Renewal, RenewalEvent, RenewalEffect]] = Table(
    "renewal",
    phase_of=lambda renewal: renewal.phase,
    rows={
        (_WAIT, Looked): Row((_WAIT, _ASK), _look),
        (_ASK, Looked): Row((_ASK,), _stay),
        (_ASK, Renewed): Row((_WAIT,), _renewed),
        (_ASK, Failed): Row((_WAIT,), _failed),
        # Late answers of an attempt that nobody waits for.
        (_WAIT, Renewed): Row((_WAIT,), _renewed),
        (_WAIT, Failed): Row((_WAIT,), _stay),
    },
)
