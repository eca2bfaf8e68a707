"""What the parts of the driver say to each other through the inbox. Each names the part that it is for."""

from __future__ import annotations

import msgspec

from edge_agent.core import intake, link, pump, renewal, training
from edge_agent.core.slot_values import Event
from shared.ids import FamilyName
from shared.wire.messages import RoundTask
from shared.wire.verification import Judged, StoredRelease


class ForSlot(msgspec.Struct, frozen=True):
    """An event of the slot machine, for this family's slot."""

    family: FamilyName
    event: Event


class ForSlots(msgspec.Struct, frozen=True):
    """Events of the slot machine that happened at once and are decided on as one."""

    events: tuple[tuple[FamilyName, Event], ...]


class ForLink(msgspec.Struct, frozen=True):
    """An event of the link machine."""

    event: link.LinkEvent


class ForPump(msgspec.Struct, frozen=True):
    """An event of the outbox pump."""

    event: pump.PumpEvent


class ForIntake(msgspec.Struct, frozen=True):
    """An event of the intake machine."""

    event: intake.IntakeEvent


class ForTraining(msgspec.Struct, frozen=True):
    """An event of the training machine."""

    event: training.TrainingEvent


class ForRenewal(msgspec.Struct, frozen=True):
    """An event of the renewal machine."""

    event: renewal.RenewalEvent


class TaskCame(msgspec.Struct, frozen=True):
    """A task of a federated run came from the hub; not yet trusted in anything."""

    task: RoundTask


class MessageArrived(msgspec.Struct, frozen=True):
    """Bytes on one of the device's down topics; not yet trusted in anything."""

    topic: str
    payload: bytes


class ReportDue(msgspec.Struct, frozen=True):
    """Time to tell the hub the device's state."""


class HeartbeatDue(msgspec.Struct, frozen=True):
    """Time to tell the hub the device's state although nothing may have changed."""


class ReconcileDue(msgspec.Struct, frozen=True):
    """Time to offer the accepted assignment's models to their slots again."""


class InstalledJudged(msgspec.Struct, frozen=True):
    """What is installed was judged after the start: these releases, and what does not hold of them."""

    releases: tuple[StoredRelease, ...]
    judged: Judged


class TimeAttested(msgspec.Struct, frozen=True):
    """The hub has attested the time, for the first time or another one than before; what waited for it goes on."""


class TimeDoubted(msgspec.Struct, frozen=True):
    """The dates of a server's certificate, or of a new one of ours, do not agree with the trusted time."""


class Noted(msgspec.Struct, frozen=True, eq=False):
    """Something happened that the hub shall know: a class 0 record."""

    name: str
    detail: dict[str, str]


class Stop(msgspec.Struct, frozen=True):
    """Leave: say goodbye to the hub, stop the hosts, end."""

    reason: str


Inward = (
    ForSlot
    | ForSlots
    | ForLink
    | ForPump
    | ForIntake
    | ForTraining
    | ForRenewal
    | TaskCame
    | MessageArrived
    | ReportDue
    | HeartbeatDue
    | InstalledJudged
    | ReconcileDue
    | TimeAttested
    | TimeDoubted
    | Noted
    | Stop
)
