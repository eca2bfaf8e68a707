"""When the hub's larger model is asked beside the local one, and when it is left alone.

    wanted(policy, …)                      whether the larger model should say something at all
    cascade, verdict = judge(cascade, …)   Ask, with the time that there is, or Stay, with the reason
    cascade = settle(cascade, event)       what became of it

Rules of this file:
1. The local answer never waits for permission: what does not allow a question is said at once, in the order offline,
   breaker, questions on their way, time, budget. Only the last one spends anything.
2. A question whose answer did not come by its deadline counts as a failure at that moment, not when it is given up.
3. Time is an argument in milliseconds of one monotonic clock; jitter is drawn by the driver and handed in.

The breaker is a table: closed, open for a time with full jitter (or what Retry-After asked for), half open for one
trial. The budget is two token buckets that hold a minute's worth. The round trip is a smoothed mean and deviation
(Jacobson and Karels, as in RFC 6298, section 2), without the making of a connection, since those are kept; it fades,
so that one slow hour does not end all questions.

Not here: sockets, the deadline's timer, and what a late answer is kept for (edge_agent/driver/escalation.py).
"""

from __future__ import annotations

import math
from enum import Enum
from typing import Annotated, Final, Literal

import msgspec
from msgspec.structs import replace

from edge_agent.core.backoff import doubled_ms, drawn_ms
from shared.limits import MAX_ESCALATED_BYTES
from shared.machine import Decision, Row, Table

Escalated = Literal["answered", "late", "refused", "offline", "budget", "breaker", "no_time"]
"""What became of an escalation, as `Answer.escalated` says it."""

MINUTE_MS: Final = 60_000
FAILURES_TO_OPEN: Final = 3
FIRST_REST_MS: Final = 500
LONGEST_REST_MS: Final = 60_000
SHORTEST_REST_MS: Final = 50
LONGEST_OPEN_MS: Final = 300_000
"""What Retry-After may ask for."""
TRIAL_MS: Final = 30_000
"""A trial of which nothing was heard by then is forgotten."""
MOST_ON_THE_WAY: Final = 4
FADE_MS: Final = 5_000
"""Without a new measurement the estimate of the round trip halves in this time."""
LEAST_MS: Final = 2
"""Less time than this is not worth a question, however fast the hub is."""


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """What the operator allows; the section `cascade` of the configuration.

    Attributes:
        model: its name at the hub; empty for never.
        family: the local family that it stands behind; empty for every one.
        below: local confidence, 0 to 1, under which it is asked; 0 asks only where no local answer can be had.
        per_minute: questions a minute; a minute's worth may be spent at once.
        bytes_per_minute: bytes of questions and answers a minute.
        margin_ms: kept from each deadline for sending the local answer; what a busy machine needs to get to it.
        late_ms: how long after its deadline an answer is still waited for.
    """

    model: str = ""
    family: str = ""
    below: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 0.0
    per_minute: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 60
    bytes_per_minute: Annotated[int, msgspec.Meta(ge=0, le=2**40)] = 16_777_216
    margin_ms: Annotated[int, msgspec.Meta(ge=1, le=60_000)] = 20
    late_ms: Annotated[int, msgspec.Meta(ge=0, le=60_000)] = 5_000


# The breaker


class BreakerPhase(Enum):
    """CLOSED: questions pass. OPEN: none does. HALF_OPEN: one is on its way as a trial."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Breaker(msgspec.Struct, frozen=True):
    """`failures` counts in a row; `opened` how often it opened in a row; until `until_ms` nothing is tried."""

    phase: BreakerPhase = BreakerPhase.CLOSED
    failures: int = 0
    opened: int = 0
    until_ms: int = 0


class Asked(msgspec.Struct, frozen=True):
    """A question goes out now."""

    at_ms: int


class Succeeded(msgspec.Struct, frozen=True):
    """Its answer came in time."""


class Failed(msgspec.Struct, frozen=True, kw_only=True):
    """It did not. `jitter` is drawn from 0 to 1; `retry_after_ms` is what the hub asked for."""

    at_ms: int
    jitter: float
    retry_after_ms: int | None = None


class Declined(msgspec.Struct, frozen=True):
    """The hub said no to this question, whose fault it is: the hub answers, and others may fare better."""


BreakerEvent = Asked | Succeeded | Failed | Declined
_Step = Decision[Breaker, None]


def may_ask(breaker: Breaker, at_ms: int) -> bool:
    """Whether a question may go out now."""
    return breaker.phase is BreakerPhase.CLOSED or at_ms >= breaker.until_ms


def _pass(breaker: Breaker, _: Asked) -> _Step:
    return Decision(breaker)


def _try(breaker: Breaker, event: Asked) -> _Step:
    if not may_ask(breaker, event.at_ms):
        return Decision(breaker)
    return Decision(replace(breaker, phase=BreakerPhase.HALF_OPEN, until_ms=event.at_ms + TRIAL_MS))


def _close(_breaker: Breaker, _: Succeeded | Declined) -> _Step:
    return Decision(Breaker())


def _stale(breaker: Breaker, _: Succeeded | Declined) -> _Step:
    return Decision(breaker)


def _count(breaker: Breaker, event: Failed) -> _Step:
    failures = breaker.failures + 1
    if failures < FAILURES_TO_OPEN and event.retry_after_ms is None:
        return Decision(replace(breaker, failures=failures))
    return _open(breaker, event)


def _open(breaker: Breaker, event: Failed) -> _Step:
    opened = breaker.opened + 1
    window_ms = doubled_ms(FIRST_REST_MS, times=opened - 1, longest_ms=LONGEST_REST_MS)
    rest_ms = drawn_ms(window_ms, jitter=event.jitter, shortest_ms=SHORTEST_REST_MS)
    delay_ms = max(rest_ms, min(event.retry_after_ms or 0, LONGEST_OPEN_MS))
    return Decision(Breaker(phase=BreakerPhase.OPEN, opened=opened, until_ms=event.at_ms + delay_ms))


def _extend(breaker: Breaker, event: Failed) -> _Step:
    asked_ms = min(event.retry_after_ms or 0, LONGEST_OPEN_MS)
    return Decision(replace(breaker, until_ms=max(breaker.until_ms, event.at_ms + asked_ms)))


_C, _O, _H = BreakerPhase.CLOSED, BreakerPhase.OPEN, BreakerPhase.HALF_OPEN

BREAKER: Final[Table[BreakerPhase, Breaker, BreakerEvent, None]] = Table(
    "breaker",
    phase_of=lambda breaker: breaker.phase,
    rows={
        (_C, Asked): Row((_C,), _pass),
        (_O, Asked): Row((_O, _H), _try),
        # A trial that was never heard of again is repeated.
        (_H, Asked): Row((_H,), _try),
        (_C, Succeeded): Row((_C,), _close),
        # An answer to a question from before it opened; the trial will tell.
        (_O, Succeeded): Row((_O,), _stale),
        (_H, Succeeded): Row((_C,), _close),
        (_C, Failed): Row((_C, _O), _count),
        (_O, Failed): Row((_O,), _extend),
        (_H, Failed): Row((_O,), _open),
        (_C, Declined): Row((_C,), _stale),
        (_O, Declined): Row((_O,), _stale),
        (_H, Declined): Row((_C,), _close),
    },
)


# The budget and the round trip


class Bucket(msgspec.Struct, frozen=True):
    """Tokens left at a moment; may be below zero after an answer that was larger than expected."""

    level: float = math.inf
    at_ms: int = 0

    def now(self, *, capacity: int, at_ms: int) -> float:
        """Tokens left by then, refilled at one capacity a minute."""
        return min(float(capacity), self.level + max(at_ms - self.at_ms, 0) * capacity / MINUTE_MS)

    def spend(self, tokens: float, *, capacity: int, at_ms: int) -> Bucket:
        """With so many tokens fewer."""
        return Bucket(self.now(capacity=capacity, at_ms=at_ms) - tokens, at_ms)


class Pace(msgspec.Struct, frozen=True):
    """How long something takes: smoothed mean and deviation in milliseconds, negative before the first measurement."""

    mean_ms: float = -1.0
    deviation_ms: float = 0.0
    at_ms: int = 0

    def expected_ms(self, at_ms: int) -> float:
        """What it will take in most cases; 0 when nothing is known any more."""
        if self.mean_ms < 0:
            return 0.0
        return float((self.mean_ms + 2 * self.deviation_ms) * 0.5 ** (max(at_ms - self.at_ms, 0) / FADE_MS))

    def measured(self, took_ms: float, *, at_ms: int) -> Pace:
        """With one more measurement."""
        if self.mean_ms < 0:
            return Pace(took_ms, took_ms / 4, at_ms)
        deviation = 0.75 * self.deviation_ms + 0.25 * abs(took_ms - self.mean_ms)
        return Pace(0.875 * self.mean_ms + 0.125 * took_ms, deviation, at_ms)


# The whole


class Cascade(msgspec.Struct, frozen=True, kw_only=True):
    """What is remembered between questions."""

    breaker: Breaker = Breaker()
    requests: Bucket = Bucket()
    bytes: Bucket = Bucket()
    round_trip: Pace = Pace()
    on_the_way: int = 0


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """One that should be asked: its size, the time to its deadline, and whether the hub can be reached."""

    size_bytes: int
    left_ms: float
    online: bool
    at_ms: int


class Ask(msgspec.Struct, frozen=True):
    """Ask; the answer is of use within this time."""

    within_ms: int


class Stay(msgspec.Struct, frozen=True):
    """Give what there is: what became of the escalation, and why, in words."""

    escalated: Escalated
    why: str


def wanted(policy: Policy, *, family: str, confidences: tuple[float, ...] | None) -> bool:
    """Whether the hub should be asked about this answer; None for confidences where there is no local answer."""
    if not covers(policy, family):
        return False
    return confidences is None or (len(confidences) == 1 and confidences[0] < policy.below)


def covers(policy: Policy, family: str) -> bool:
    """Whether the hub's model stands behind this family."""
    return bool(policy.model) and policy.family in ("", family)


def judge(cascade: Cascade, policy: Policy, question: Question) -> tuple[Cascade, Ask | Stay]:
    """Whether this question goes out; if so, it is counted and paid for."""
    stay = _obstacle(cascade, policy, question)
    if stay is not None:
        return cascade, stay
    at_ms = question.at_ms
    after = replace(
        cascade,
        breaker=BREAKER.decide(cascade.breaker, Asked(at_ms)).state,
        requests=cascade.requests.spend(1, capacity=policy.per_minute, at_ms=at_ms),
        bytes=cascade.bytes.spend(question.size_bytes, capacity=policy.bytes_per_minute, at_ms=at_ms),
        on_the_way=cascade.on_the_way + 1,
    )
    return after, Ask(int(question.left_ms) - policy.margin_ms)


def _obstacle(cascade: Cascade, policy: Policy, question: Question) -> Stay | None:
    at_ms = question.at_ms
    if not question.online:
        return Stay("offline", "the hub cannot be reached")
    if not may_ask(cascade.breaker, at_ms):
        then = f"it is tried again in {cascade.breaker.until_ms - at_ms} ms"
        if cascade.breaker.phase is BreakerPhase.HALF_OPEN:
            then = "a question is on its way to try whether it answers"
        return Stay("breaker", f"the hub failed or asked for a pause; {then}")
    if cascade.on_the_way >= MOST_ON_THE_WAY:
        return Stay("budget", f"{cascade.on_the_way} questions are on their way to the hub")
    left_ms = int(question.left_ms) - policy.margin_ms
    expected_ms = max(cascade.round_trip.expected_ms(at_ms), LEAST_MS)
    if left_ms < expected_ms:
        return Stay("no_time", f"{max(left_ms, 0)} ms are left, the hub takes about {expected_ms:.0f} ms")
    if question.size_bytes > MAX_ESCALATED_BYTES:
        return Stay("budget", f"{question.size_bytes} bytes exceed the {MAX_ESCALATED_BYTES} that are sent to the hub")
    if cascade.requests.now(capacity=policy.per_minute, at_ms=at_ms) < 1:
        return Stay("budget", f"{policy.per_minute} questions a minute are spent")
    if cascade.bytes.now(capacity=policy.bytes_per_minute, at_ms=at_ms) < question.size_bytes:
        return Stay("budget", f"{policy.bytes_per_minute} bytes a minute are spent")
    return None


class Came(msgspec.Struct, frozen=True, kw_only=True):
    """An answer came, on an open connection in `took_ms`; `late` when its deadline had passed, told with Missed."""

    took_ms: float
    size_bytes: int
    late: bool
    at_ms: int


class Missed(msgspec.Struct, frozen=True, kw_only=True):
    """The deadline passed; the question is still on its way."""

    at_ms: int
    jitter: float


class Refused(msgspec.Struct, frozen=True, kw_only=True):
    """The hub said no, could not be reached or said nothing of use, before the deadline."""

    at_ms: int
    jitter: float
    retry_after_ms: int | None = None


class GaveUp(msgspec.Struct, frozen=True):
    """Nothing of use came after Missed either, or the question was never sent."""


Settled = Came | Missed | Refused | Declined | GaveUp


def settle(cascade: Cascade, policy: Policy, event: Settled) -> Cascade:
    """What became of a question that went out."""
    match event:
        case Came(took_ms=took_ms, size_bytes=size_bytes, late=late, at_ms=at_ms):
            breaker = cascade.breaker if late else BREAKER.decide(cascade.breaker, Succeeded()).state
            return replace(
                cascade,
                breaker=breaker,
                bytes=cascade.bytes.spend(size_bytes, capacity=policy.bytes_per_minute, at_ms=at_ms),
                round_trip=cascade.round_trip.measured(took_ms, at_ms=at_ms),
                on_the_way=cascade.on_the_way - 1,
            )
        case Missed(at_ms=at_ms, jitter=jitter):
            failed = Failed(at_ms=at_ms, jitter=jitter)
            return replace(cascade, breaker=BREAKER.decide(cascade.breaker, failed).state)
        case Refused(at_ms=at_ms, jitter=jitter, retry_after_ms=retry_after_ms):
            failed = Failed(at_ms=at_ms, jitter=jitter, retry_after_ms=retry_after_ms)
            breaker = BREAKER.decide(cascade.breaker, failed).state
            return replace(cascade, breaker=breaker, on_the_way=cascade.on_the_way - 1)
        case Declined():
            breaker = BREAKER.decide(cascade.breaker, event).state
            return replace(cascade, breaker=breaker, on_the_way=cascade.on_the_way - 1)
        case GaveUp():
            return replace(cascade, on_the_way=cascade.on_the_way - 1)
