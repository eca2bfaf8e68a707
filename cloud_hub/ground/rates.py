"""Token buckets: how often somebody may try. Pure: time is an argument."""

from __future__ import annotations

import ipaddress
import math
from collections import OrderedDict
from typing import Final

_MAX_KEYS: Final = 10_000


class Buckets:
    """One bucket per key. Keys unused for longest are forgotten above a bound, which only ever favours the caller.

    Args:
        burst: how many tries a fresh bucket holds.
        per_minute: how many come back in a minute.
    """

    def __init__(self, *, burst: int, per_minute: int) -> None:
        self._burst = burst
        self._per_ms = per_minute / 60_000
        self._levels: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def take(self, key: str, *, now_ms: int) -> int:
        """Take one try: 0 when there was one, else the seconds until there will be."""
        level, at_ms = self._levels.pop(key, (float(self._burst), now_ms))
        level = min(float(self._burst), level + max(0, now_ms - at_ms) * self._per_ms)
        allowed = level >= 1
        self._levels[key] = (level - 1 if allowed else level, now_ms)
        if len(self._levels) > _MAX_KEYS:
            self._levels.popitem(last=False)
        return 0 if allowed else max(1, math.ceil((1 - level) / self._per_ms / 1000))


def source_of(address: str) -> str:
    """What to count a network address by: an IPv4 address alone, an IPv6 address with all of its /64.

    One customer of one provider has at least a /64 (RFC 6177), so a single host could take a fresh address per try.
    """
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    if not isinstance(found, ipaddress.IPv6Address):
        return str(found)
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(ipaddress.IPv6Network((int(found) >> 64 << 64, 64)))
