"""Events between rooms of one process. Handlers run one after another, in the order of subscription, and are awaited.

An event says what has been committed; losing one must do no harm, because each controller also looks for itself now
and then.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from shared.errors import OutriderError
from shared.ids import DeviceId
from shared.wire.messages import RunningModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DeviceBorn:
    """A device has connected; `assignment_version` is the newest assignment that it says it has (0 for none)."""

    device: DeviceId
    assignment_version: int
    boot: int


@dataclass(frozen=True, slots=True)
class DeviceDied:
    """A device has gone; `reason` is `lost` or `stopped`."""

    device: DeviceId
    reason: str


@dataclass(frozen=True, slots=True)
class DeviceReported:
    """A device has told its state, and it was newer than what the hub knew."""

    device: DeviceId
    assignment_version: int
    models: tuple[RunningModel, ...]


@dataclass(frozen=True, slots=True)
class DeviceStandingChanged:
    """A device was put into quarantine (`quarantined`), let out again (empty) or `revoked`."""

    device: DeviceId
    standing: str


Event = DeviceBorn | DeviceDied | DeviceReported | DeviceStandingChanged

E = TypeVar("E", DeviceBorn, DeviceDied, DeviceReported, DeviceStandingChanged)


class Bus:
    """Delivers events to whoever subscribed to their type."""

    def __init__(self) -> None:
        self._handlers: dict[type[Event], list[Callable[[Any], Awaitable[None]]]] = {}

    def subscribe(self, kind: type[E], handler: Callable[[E], Awaitable[None]]) -> None:
        """Call the handler for each event of exactly this type from now on."""
        self._handlers.setdefault(kind, []).append(handler)

    async def publish(self, event: Event) -> None:
        """Deliver to all subscribers; one that fails with an OutriderError is logged and the others still hear it."""
        for handler in self._handlers.get(type(event), ()):
            try:
                await handler(event)
            except OutriderError as error:
                logger.warning("event not taken: %s (%s: %s)", type(event).__name__, error.code, error.message)
