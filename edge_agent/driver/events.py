"""What the parts of the driver say to each other through the inbox. Each names the part that it is for."""

from __future__ import annotations

from dataclasses import dataclass

from edge_agent.core import intake, link, pump
from edge_agent.core.slot_values import Event
from shared.ids import FamilyName


@dataclass(frozen=True, slots=True)
class ForSlot:
    """An event of the slot machine, for this family's slot."""

    family: FamilyName
    event: Event


@dataclass(frozen=True, slots=True)
class ForLink:
    """An event of the link machine."""

    event: link.LinkEvent


@dataclass(frozen=True, slots=True)
class ForPump:
    """An event of the outbox pump."""

    event: pump.PumpEvent


@dataclass(frozen=True, slots=True)
class ForIntake:
    """An event of the intake machine."""

    event: intake.IntakeEvent


@dataclass(frozen=True, slots=True)
class MessageArrived:
    """Bytes on one of the device's down topics; not yet trusted in anything."""

    topic: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class ReportDue:
    """Time to tell the hub the device's state."""


@dataclass(frozen=True, slots=True)
class HeartbeatDue:
    """Time to tell the hub the device's state although nothing may have changed."""


@dataclass(frozen=True, slots=True)
class ReconcileDue:
    """Time to offer the accepted assignment's models to their slots again."""


@dataclass(frozen=True, slots=True, eq=False)
class Noted:
    """Something happened that the hub shall know: a class 0 record."""

    name: str
    detail: dict[str, str]


@dataclass(frozen=True, slots=True)
class Stop:
    """Leave: say goodbye to the hub, stop the hosts, end."""

    reason: str


Inward = (
    ForSlot | ForLink | ForPump | ForIntake | MessageArrived | ReportDue | HeartbeatDue | ReconcileDue | Noted | Stop
)
