"""What a seed's world is like: how large, how fast, and what goes wrong in it.

A profile says what may go wrong; the seed draws a plan from it. `mixed`, the usual one, lets the seed choose among the
others, or blend two of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from random import Random
from types import MappingProxyType
from typing import Final

from edge_agent.core.journal import JournalBounds
from shared.limits import KIB
from shared.telemetry import RecordClass
from tests.sim.disk import Tearing
from tests.sim.net import Weather


class Trouble(Enum):
    """What can happen, each at random moments until the faults stop."""

    KILL = "the agent is killed"
    STOP = "the agent is stopped cleanly"
    RESIZE = "the agent is stopped and started with files of another size"
    DROP = "a person drops what waits of a class"
    POWER = "the device loses its power inside a call of the disk"
    OUTAGE = "the device loses its power for a while"
    CUT = "a line is cut"
    BROKER = "the broker dies"
    HUB = "a hub process dies"
    HUB_COMMIT = "a hub process dies just before or after its commit"
    IO = "a call of the disk fails"
    FULL = "a write finds the disk full"
    CROWD = "somebody else fills the disk, or makes room"
    CLOCK = "the wall clock jumps"
    SYNC = "the wall clock is put right, or is no longer known to be"
    ROT = "a bit on the disk changes"
    NEW_DISK = "the disk is replaced by an empty one"
    OLD_DISK = "the disk is set back to an older image of itself"
    BURST = "many records come at once"


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What applications put.

    Attributes:
        records: in all, by each device.
        pause_ms: between two of them, on average.
        padding: bytes that a record is made longer by, at most.
        linger_ms: until a commit is made of what was put.
        weights: of the classes.
    """

    records: int
    pause_ms: float
    padding: int
    linger_ms: int
    weights: tuple[float, float, float, float] = (1.0, 1.0, 2.0, 3.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One seed's world.

    Attributes:
        troubles: mean milliseconds between two of a kind, over the whole world.
        chaos_ms: until the faults stop; `heal_ms`: how long everything may then take to arrive.
        capacity: bytes of each device's file system.
    """

    profile: str
    devices: int
    hubs: int
    bounds: JournalBounds
    load: Load
    weather: Weather
    troubles: Mapping[Trouble, float]
    tearing: Tearing
    chaos_ms: int
    capacity: int
    heal_ms: int = 900_000
    slots: bool = False
    commit_ms: float = 5.0
    hub_commit_ms: float = 20.0
    busy: float = 0.0


def plan_of(profile: str, random: Random) -> Plan:
    """The plan that this profile and generator make."""
    return PROFILES[profile](random)


def _bounds(random: Random, *, segments: int = 40, ttl_ms: Mapping[RecordClass, int] | None = None) -> JournalBounds:
    size = random.choice((1, 2, 4, 4, 8)) * KIB
    return JournalBounds(
        total_bytes=(segments + random.randrange(8)) * size + 16 * KIB,
        segment_bytes=size,
        batch_bytes=min(size // 2, random.choice((512, 1024, 2048))),
        batch_records=random.choice((3, 8, 20)),
        ttl_ms=dict(ttl_ms or {}),
        spares=random.choice((0, 1, 2)),
    )


def _load(random: Random, *, records: int = 60, pause_ms: float = 800.0) -> Load:
    return Load(
        records=records // 2 + random.randrange(records),
        pause_ms=pause_ms * random.choice((0.2, 1.0, 1.0, 2.0)),
        padding=random.choice((0, 20, 120, 200)),
        linger_ms=random.choice((0, 20, 200, 1000)),
        weights=random.choice(((1.0, 1.0, 2.0, 3.0), (3.0, 0.0, 0.0, 1.0), (0.0, 0.0, 0.0, 1.0), (1.0, 1.0, 1.0, 1.0))),
    )


def _calm(random: Random) -> Plan:
    return Plan(
        profile="calm",
        devices=1,
        hubs=1,
        bounds=_bounds(random, segments=400),
        load=_load(random),
        weather=Weather(delay_ms=random.choice((1.0, 20.0, 200.0))),
        troubles={},
        tearing=random.choice(tuple(Tearing)),
        chaos_ms=60_000,
        capacity=1 << 40,
        commit_ms=random.choice((0.0, 5.0, 200.0)),
        hub_commit_ms=random.choice((0.0, 20.0, 500.0)),
    )


def _wild(random: Random) -> Weather:
    harm = random.choice((0.0, 0.05, 0.3))
    return Weather(
        delay_ms=random.choice((5.0, 50.0, 1000.0)),
        notice_ms=random.choice((10.0, 1000.0, 20_000.0)),
        loss=harm,
        repeat=random.choice((0.0, harm)),
        overtake=random.choice((0.0, harm)),
        refuse=random.choice((0.0, 0.1)),
        holds=random.random() < 0.5,
        redeliver=random.random() < 0.5,
    )


def _network(random: Random) -> Plan:
    troubles = {Trouble.CUT: random.choice((4_000.0, 15_000.0)), Trouble.BROKER: 30_000.0, Trouble.HUB: 40_000.0}
    weather = _wild(random)
    busy = random.choice((0.0, 0.2))
    return replace(_calm(random), profile="network", weather=weather, troubles=troubles, busy=busy)


def _line(random: Random) -> Plan:
    """Plain TCP, whose order is promised to be kept."""
    weather = replace(_wild(random), loss=0.0, repeat=0.0, overtake=0.0, refuse=0.0)
    troubles = {Trouble.CUT: random.choice((3_000.0, 10_000.0)), Trouble.BROKER: 40_000.0, Trouble.KILL: 20_000.0}
    return replace(_calm(random), profile="line", weather=weather, troubles=troubles)


def _crashes(random: Random) -> Plan:
    troubles = {
        Trouble.KILL: 6_000.0,
        Trouble.STOP: random.choice((10_000.0, 60_000.0)),
        Trouble.HUB: 15_000.0,
        Trouble.HUB_COMMIT: 10_000.0,
        Trouble.CUT: 30_000.0,
    }
    return replace(_calm(random), profile="crashes", hubs=random.choice((1, 2)), troubles=troubles)


def _power(random: Random) -> Plan:
    troubles = {Trouble.POWER: random.choice((2_000.0, 6_000.0)), Trouble.OUTAGE: 30_000.0, Trouble.CUT: 20_000.0}
    troubles |= {Trouble.RESIZE: random.choice((20_000.0, 200_000.0)), Trouble.DROP: 60_000.0}
    return replace(_calm(random), profile="power", bounds=_bounds(random, segments=12), troubles=troubles)


def _fullness(random: Random) -> Plan:
    bounds = _bounds(random, segments=random.choice((3, 6, 9)))
    free = random.choice((1 << 40, bounds.total_bytes, bounds.total_bytes * 2 // 3))
    troubles = {
        Trouble.CROWD: 10_000.0,
        Trouble.FULL: random.choice((2_000.0, 8_000.0)),
        Trouble.IO: random.choice((5_000.0, 60_000.0)),
        Trouble.BURST: 15_000.0,
        Trouble.DROP: random.choice((15_000.0, 200_000.0)),
        Trouble.RESIZE: random.choice((20_000.0, 200_000.0)),
        Trouble.POWER: 10_000.0,
        Trouble.BROKER: 20_000.0,
    }
    load = _load(random, records=80, pause_ms=500.0)
    return replace(_calm(random), profile="fullness", bounds=bounds, capacity=free, troubles=troubles, load=load)


def _io_errors(random: Random) -> Plan:
    troubles = {Trouble.IO: random.choice((1_000.0, 4_000.0)), Trouble.KILL: 15_000.0, Trouble.OUTAGE: 20_000.0}
    troubles |= {Trouble.POWER: 10_000.0}
    return replace(_calm(random), profile="io_errors", bounds=_bounds(random, segments=20), troubles=troubles)


def _rot(random: Random) -> Plan:
    troubles = {Trouble.ROT: random.choice((1_000.0, 5_000.0)), Trouble.KILL: 10_000.0, Trouble.BROKER: 15_000.0}
    troubles |= {Trouble.POWER: 15_000.0, Trouble.NEW_DISK: 60_000.0}
    return replace(_calm(random), profile="rot", bounds=_bounds(random, segments=20), troubles=troubles)


def _copies(random: Random) -> Plan:
    """Disks that are replaced, and cards that are written back from an image."""
    troubles = {Trouble.OLD_DISK: random.choice((5_000.0, 15_000.0)), Trouble.NEW_DISK: 60_000.0, Trouble.CUT: 15_000.0}
    troubles |= {Trouble.POWER: 20_000.0, Trouble.KILL: 20_000.0}
    return replace(_calm(random), profile="copies", bounds=_bounds(random, segments=20), troubles=troubles)


def _clocks(random: Random) -> Plan:
    ttl_ms = random.choice((20_000, 60_000, 200_000))
    classes = random.sample([RecordClass.OUTCOME, RecordClass.RESULT, RecordClass.READING], 2)
    troubles = {
        Trouble.CLOCK: 4_000.0,
        Trouble.SYNC: 10_000.0,
        Trouble.OUTAGE: 25_000.0,
        Trouble.BROKER: 20_000.0,
        Trouble.KILL: random.choice((5_000.0, 20_000.0)),
    }
    return replace(
        _calm(random),
        profile="clocks",
        bounds=_bounds(random, segments=40, ttl_ms=dict.fromkeys(classes, ttl_ms)),
        troubles=troubles,
        load=_load(random, records=60, pause_ms=1500.0),
        chaos_ms=120_000,
    )


def _fleet(random: Random) -> Plan:
    troubles = {
        Trouble.CUT: 3_000.0,
        Trouble.BROKER: 20_000.0,
        Trouble.HUB: 15_000.0,
        Trouble.HUB_COMMIT: 8_000.0,
        Trouble.POWER: 10_000.0,
        Trouble.KILL: 15_000.0,
    }
    return replace(
        _calm(random),
        profile="fleet",
        devices=random.randrange(2, 5),
        hubs=2,
        weather=_wild(random),
        troubles=troubles,
        load=_load(random, records=25),
    )


def _slots(random: Random) -> Plan:
    troubles = {Trouble.POWER: 3_000.0, Trouble.OUTAGE: 10_000.0, Trouble.KILL: 10_000.0, Trouble.CUT: 15_000.0}
    return replace(_calm(random), profile="slots", slots=True, troubles=troubles, load=_load(random, records=16))


def _mixed(random: Random) -> Plan:
    names = [*(name for name in PROFILES if name != "mixed"), *OFTEN]
    first = PROFILES[random.choice(names)](random)
    if random.random() < 0.5:
        return first
    second = PROFILES[random.choice(names)](random)
    return replace(
        first,
        profile=f"{first.profile}+{second.profile}",
        troubles={**second.troubles, **first.troubles},
        weather=random.choice((first.weather, second.weather)),
        hubs=max(first.hubs, second.hubs),
        slots=first.slots or second.slots,
    )


OFTEN: Final = ("fullness", "fullness", "power", "io_errors")
"""Profiles that `mixed` draws more often than the others: what they find is found nowhere else."""

PROFILES: Final[Mapping[str, Callable[[Random], Plan]]] = MappingProxyType(
    {
        "calm": _calm,
        "line": _line,
        "network": _network,
        "crashes": _crashes,
        "power": _power,
        "fullness": _fullness,
        "io_errors": _io_errors,
        "rot": _rot,
        "copies": _copies,
        "clocks": _clocks,
        "fleet": _fleet,
        "slots": _slots,
        "mixed": _mixed,
    }
)
