"""What a device may fetch in a day, what it has fetched, and which files came wrong: figures and decisions.

Rules of this file:
1. Bytes are charged before they are asked for, and what did not come is given back: a power cut may make the count
   too high by one grant and never too low.
2. A day is any 24 hours of this record's own clock, which counts while the machine is up. Of the time in which it was
   off, it counts what two synchronised wall clocks say and nothing otherwise, so that neither a power cut nor a wrong
   clock refills a budget.
3. A file that came wrong is asked for again ever later, so that no hub and no mirror can make a device fetch for ever.

Not here: keeping the record (the ledger), the clocks and the transfers (`edge_agent/driver`).
"""

from __future__ import annotations

from typing import Final

import msgspec

from edge_agent.core.backoff import doubled_ms
from edge_agent.core.journal import Moment
from shared.limits import KIB, MIB

HOUR_MS: Final = 3_600_000
DAY_HOURS: Final = 24
SMALLEST_GRANT_BYTES: Final = 64 * KIB
LARGEST_GRANT_BYTES: Final = 8 * MIB
GRANTS_IN_A_DAY: Final = 16
FIRST_BAR_MS: Final = HOUR_MS
LONGEST_BAR_MS: Final = 7 * 24 * HOUR_MS
MAX_STRIKES: Final = 64


class Strike(msgspec.Struct, frozen=True):
    """A file that came wrong: how often, and until when (this record's clock) it is not asked for."""

    times: int
    until_ms: int


class Spending(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The record, as it is kept.

    Attributes:
        clock_ms: this record's own clock, when it was written.
        boot, uptime_ms, wall_ms, synchronised: the machine's clocks then (`Moment`).
        hours: bytes by hour of this record's clock, the last 24 of them.
        strikes: by digest, files and patches that came wrong.
        total_bytes: fetched since the state directory was made.
        saved_bytes: that patches made unnecessary.
        patched, patch_failed: files that were made by a patch, and patches that did not make what they promised.
    """

    clock_ms: int = 0
    boot: str = ""
    uptime_ms: int = 0
    wall_ms: int = 0
    synchronised: bool = False
    hours: dict[int, int] = {}
    strikes: dict[str, Strike] = {}
    total_bytes: int = 0
    saved_bytes: int = 0
    patched: int = 0
    patch_failed: int = 0


def moved(spending: Spending, now: Moment) -> Spending:
    """The record at this moment: its clock moved on, and what is a day old forgotten."""
    if spending.boot == now.boot:
        passed_ms = max(0, now.uptime_ms - spending.uptime_ms)
    else:
        passed_ms = now.uptime_ms
        if spending.boot and spending.synchronised and now.synchronised:
            passed_ms = max(passed_ms, now.wall_ms - spending.wall_ms)
    clock_ms = spending.clock_ms + passed_ms
    oldest = clock_ms // HOUR_MS - DAY_HOURS
    return msgspec.structs.replace(
        spending,
        clock_ms=clock_ms,
        boot=now.boot,
        uptime_ms=now.uptime_ms,
        wall_ms=now.wall_ms,
        synchronised=now.synchronised,
        # An hour is forgotten when all of it is a day old, so that no 24 hours hold more than a day's budget.
        hours={hour: count for hour, count in spending.hours.items() if hour >= oldest},
    )


def spent_day(now: Moment, *, daily_bytes: int) -> Spending:
    """A record in place of one that is lost: the day's budget counts as spent now, because it may have been."""
    fresh = moved(Spending(), now)
    return msgspec.structs.replace(fresh, hours={fresh.clock_ms // HOUR_MS: daily_bytes} if daily_bytes else {})


def left_bytes(spending: Spending, *, daily_bytes: int) -> int:
    """What may still be fetched now."""
    return max(0, daily_bytes - sum(spending.hours.values()))


def grant_bytes(spending: Spending, *, daily_bytes: int, wanted_bytes: int) -> int:
    """How much of what is wanted may be asked for at once; 0 means: wait. `daily_bytes` 0 is no budget."""
    if not daily_bytes:
        return wanted_bytes
    left = left_bytes(spending, daily_bytes=daily_bytes)
    # A few bytes are not worth a connection: wait until there are more, or all that is wanted.
    if left < min(wanted_bytes, SMALLEST_GRANT_BYTES, daily_bytes):
        return 0
    slice_bytes = max(SMALLEST_GRANT_BYTES, min(LARGEST_GRANT_BYTES, daily_bytes // GRANTS_IN_A_DAY))
    return min(wanted_bytes, slice_bytes, left)


def charged(spending: Spending, count: int) -> Spending:
    """So many bytes more; fewer than none gives back what was charged last."""
    hour = spending.clock_ms // HOUR_MS
    hours = dict(spending.hours)
    if count >= 0:
        hours[hour] = hours.get(hour, 0) + count
        return msgspec.structs.replace(spending, hours=hours, total_bytes=spending.total_bytes + count)
    rest = -count
    for known in sorted(hours, reverse=True):
        taken = min(rest, hours[known])
        hours[known] -= taken
        rest -= taken
    return msgspec.structs.replace(spending, hours=hours, total_bytes=max(0, spending.total_bytes + count))


def struck(spending: Spending, digest: str, *, free: int = 0) -> Spending:
    """This file was wrong once more: it is left alone for an hour, then for two, and so on up to a week.

    The first `free` times of all are only counted.
    """
    before = spending.strikes.get(digest)
    times = 1 if before is None else before.times + 1
    bar_ms = 0 if times <= free else doubled_ms(FIRST_BAR_MS, times=times - free - 1, longest_ms=LONGEST_BAR_MS)
    others = [(name, strike) for name, strike in spending.strikes.items() if name != digest]
    kept = dict([*others[-(MAX_STRIKES - 1) :], (digest, Strike(times, spending.clock_ms + bar_ms))])
    return msgspec.structs.replace(spending, strikes=kept)


def forgiven(spending: Spending, digest: str) -> Spending:
    """This file came right: what was held against it is forgotten."""
    if digest not in spending.strikes:
        return spending
    rest = {name: strike for name, strike in spending.strikes.items() if name != digest}
    return msgspec.structs.replace(spending, strikes=rest)


def barred_ms(spending: Spending, digest: str) -> int:
    """How long this file is still left alone, by this record's clock; 0 when it may be asked for."""
    strike = spending.strikes.get(digest)
    return 0 if strike is None else max(0, strike.until_ms - spending.clock_ms)
