"""All defences, from the tables by subject. Numbered as in docs/attacks.md."""

from __future__ import annotations

from typing import Final

from tests.attacks.defence import Defence
from tests.attacks.tables import broker, device, hub, learned, trust

DEFENCES: Final[tuple[Defence, ...]] = tuple(
    sorted(
        (*trust.DEFENCES, *learned.DEFENCES, *device.DEFENCES, *broker.DEFENCES, *hub.DEFENCES),
        key=lambda defence: defence.row,
    )
)
