"""What rooms send to devices: a body in an envelope on the right topic."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Literal, Protocol

from shared.clock import Clock
from shared.errors import Unreachable
from shared.ids import DeviceId
from shared.wire import topics
from shared.wire.envelope import WIRE_VERSION, Envelope, encode_envelope
from shared.wire.messages import KIND_OF, Message, encode_body


class Publish(Protocol):
    """Hands bytes to the link (`HubCourier.publish`); raises Unreachable without one."""

    async def __call__(self, topic: str, payload: bytes, *, qos: Literal[0, 1] = 1) -> None:
        """Publish on a topic."""
        ...


def everybody(_device: DeviceId) -> bool:
    """Nobody is barred."""
    return True


class Post:
    """Sends messages to devices.

    Args:
        publish: hands bytes to the link.
        clock: for the envelope's times.
        is_welcome: whether a device may be sent anything.
    """

    def __init__(self, *, publish: Publish, clock: Clock, is_welcome: Callable[[DeviceId], bool] = everybody) -> None:
        self._is_welcome = is_welcome
        self._publish = publish
        self._clock = clock

    async def send(
        self,
        device: DeviceId,
        message: Message,
        *,
        leaf: topics.DownLeaf,
        correlation: str | None = None,
        qos: Literal[0, 1] = 1,
    ) -> None:
        """Send; returns when the link has it, which does not say that the device does.

        Raises:
            Unreachable: there is no link, or the device is not welcome.
        """
        if not self._is_welcome(device):
            raise Unreachable(f"{device!r} is in quarantine or revoked: nothing is sent", code="transfer.barred")
        envelope = Envelope(
            v=WIRE_VERSION,
            id=secrets.token_hex(8),
            kind=KIND_OF[type(message)],
            device=device,
            boot=0,
            wall_ms=self._clock.wall_ms(),
            mono_ms=self._clock.mono_ms(),
            body=encode_body(message),
            correlation=correlation,
        )
        await self._publish(topics.down(device, leaf), encode_envelope(envelope), qos=qos)
