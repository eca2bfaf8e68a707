"""The link machine: when to connect, and how long to wait after it did not work.

    decision = decide(link, event)         nothing is saved: a link starts anew with the process

Rules of this file:
1. A wait is drawn from the whole of a window (full jitter); the driver draws and hands it in. Windows widen with each
   failure up to a minute.
2. A link that is lost begins with a window of 6 s, because its whole fleet may have lost it in the same moment. The
   first tries fall into any second of the six with the same chance, and the next windows are so much wider that however
   long the broker was away, no second brings back more than a quarter of the fleet (tests/machines/test_link_fleet.py).
   They stay at 15 s for a while: a device that was merely cut off is back within 6 s, three on average, and one whose
   hub restarts in some seconds is back within 15 s of that, mostly within five.
3. Only a link that held for 30 s counts as good again; one that is lost at once keeps waiting longer.

There is one timer. Not here: the courier, presence, what is sent.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

import msgspec
from msgspec.structs import replace

from edge_agent.core.backoff import drawn_ms
from shared.machine import Decision, Row, Table

WINDOWS_MS: Final = (
    750, 1_500, 3_000, 6_000, 15_000, 15_000, 15_000, 15_000, 15_000, 20_000, 20_000, 30_000, 45_000, 60_000,
)  # fmt: skip
"""By the number of failures. One that never had a link is likely alone, and begins at the first."""
LOST_FAILURES: Final = 4
"""A lost link counts like so many failures."""
LONGEST_WINDOW_MS: Final = WINDOWS_MS[-1]
SHORTEST_WAIT_MS: Final = 50
STEADY_MS: Final = 30_000


class LinkPhase(Enum):
    """OFFLINE: stopped, or waiting for the timer. The values are those of `AgentState.link`."""

    OFFLINE = "offline"
    CONNECTING = "connecting"
    ONLINE = "online"


class Link(msgspec.Struct, frozen=True):
    """`wanted` is False while stopped; `failures` counts since the link last held; `detail` says why it is not up."""

    phase: LinkPhase = LinkPhase.OFFLINE
    wanted: bool = False
    failures: int = 0
    detail: str = ""


class StartLink(msgspec.Struct, frozen=True):
    """The link is wanted, now; while waiting, this cuts the waiting short."""


class Connected(msgspec.Struct, frozen=True):
    """The courier is connected and subscribed."""


class ConnectFailed(msgspec.Struct, frozen=True, kw_only=True):
    """The courier could not connect. `jitter` is drawn from 0 to 1."""

    jitter: float
    reason: str = ""


class Lost(msgspec.Struct, frozen=True, kw_only=True):
    """The connection broke. `jitter` is drawn from 0 to 1."""

    jitter: float
    reason: str = ""


class TimerFired(msgspec.Struct, frozen=True):
    """The link's timer."""


class Reconnect(msgspec.Struct, frozen=True):
    """Connect anew, now: there is a new certificate, which only a new connection can show."""


class StopLink(msgspec.Struct, frozen=True):
    """The link is no longer wanted."""


LinkEvent = StartLink | Connected | ConnectFailed | Lost | TimerFired | Reconnect | StopLink


class Connect(msgspec.Struct, frozen=True):
    """Let the courier connect; answered by Connected or ConnectFailed."""


class Announce(msgspec.Struct, frozen=True):
    """Say birth and state; then let the pump know that the link is up."""


class Disconnect(msgspec.Struct, frozen=True):
    """Leave without triggering the last will; also ends an attempt under way. Not answered."""


class StartTimer(msgspec.Struct, frozen=True):
    """Say TimerFired after this time; replaces the one that runs."""

    delay_ms: int


class StopTimer(msgspec.Struct, frozen=True):
    """Forget the timer."""


LinkEffect = Connect | Announce | Disconnect | StartTimer | StopTimer
_Step = Decision[Link, LinkEffect]


def decide(link: Link, event: LinkEvent) -> _Step:
    """The link after this event, and what to do."""
    return LINK.decide(link, event)


def wait_ms(failures: int, *, jitter: float) -> int:
    """Any moment of the window that belongs to so many failures."""
    window_ms = WINDOWS_MS[min(max(failures, 1), len(WINDOWS_MS)) - 1]
    return drawn_ms(window_ms, jitter=jitter, shortest_ms=SHORTEST_WAIT_MS)


def _connect(link: Link, _: StartLink) -> _Step:
    return Decision(replace(link, phase=LinkPhase.CONNECTING, wanted=True), (StopTimer(), Connect()))


def _timer(link: Link, _: TimerFired) -> _Step:
    if not link.wanted:
        return Decision(link)
    return Decision(replace(link, phase=LinkPhase.CONNECTING), (Connect(),))


def _connected(link: Link, _: Connected) -> _Step:
    return Decision(replace(link, phase=LinkPhase.ONLINE, detail=""), (StartTimer(STEADY_MS), Announce()))


def _stray(link: Link, _: Connected) -> _Step:
    return Decision(link, (Disconnect(),))


def _failed(link: Link, event: ConnectFailed | Lost) -> _Step:
    failures = link.failures + 1
    if isinstance(event, Lost):
        failures = max(failures, LOST_FAILURES)
    delay_ms = wait_ms(failures, jitter=event.jitter)
    after = replace(link, phase=LinkPhase.OFFLINE, failures=failures, detail=event.reason)
    return Decision(after, (StartTimer(delay_ms),))


def _steady(link: Link, _: TimerFired) -> _Step:
    return Decision(replace(link, failures=0))


def _anew(link: Link, _: Reconnect) -> _Step:
    if not link.wanted:
        return Decision(link)
    after = replace(link, phase=LinkPhase.CONNECTING, detail="connecting with a new certificate")
    return Decision(after, (StopTimer(), Connect()))


def _stop(_link: Link, _: StopLink) -> _Step:
    return Decision(Link(detail="stopped"), (StopTimer(), Disconnect()))


def _stay(link: Link, _: LinkEvent) -> _Step:
    return Decision(link)


_OFF, _TRY, _ON = LinkPhase.OFFLINE, LinkPhase.CONNECTING, LinkPhase.ONLINE

LINK: Final[Table[LinkPhase, Link, LinkEvent, LinkEffect]] = Table(
    "link",
    phase_of=lambda link: link.phase,
    rows={
        (_OFF, StartLink): Row((_TRY,), _connect),
        (_TRY, StartLink): Row((_TRY,), _stay),
        (_ON, StartLink): Row((_ON,), _stay),
        (_TRY, Connected): Row((_ON,), _connected),
        # Connected just as it was stopped or had been given up: nobody wants this connection.
        (_OFF, Connected): Row((_OFF,), _stray),
        (_ON, Connected): Row((_ON,), _stay),
        (_TRY, ConnectFailed): Row((_OFF,), _failed),
        # Late answers of an attempt that was ended.
        (_OFF, ConnectFailed): Row((_OFF,), _stay),
        (_ON, ConnectFailed): Row((_ON,), _stay),
        (_ON, Lost): Row((_OFF,), _failed),
        (_TRY, Lost): Row((_OFF,), _failed),
        (_OFF, Lost): Row((_OFF,), _stay),
        (_OFF, TimerFired): Row((_OFF, _TRY), _timer),
        (_TRY, TimerFired): Row((_TRY,), _stay),
        (_ON, TimerFired): Row((_ON,), _steady),
        # The courier ends its former connection, or attempt, before it begins another.
        (_OFF, Reconnect): Row((_OFF, _TRY), _anew),
        (_TRY, Reconnect): Row((_TRY,), _anew),
        (_ON, Reconnect): Row((_TRY,), _anew),
        (_OFF, StopLink): Row((_OFF,), _stop),
        (_TRY, StopLink): Row((_OFF,), _stop),
        (_ON, StopLink): Row((_OFF,), _stop),
    },
)
