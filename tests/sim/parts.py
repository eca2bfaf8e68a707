"""What the world is built of, so that a planted fault can take the place of one part; and records and their bytes.

A record of the world is a token, a number that is in its body's text, so that it can be found on a disk and at the hub.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edge_agent.adapters.journal import Journal
from edge_agent.adapters.records import encode_record
from shared.telemetry import Body, DeviceEvent, Outcome, Reading, RecordClass, Result
from shared.wire.columns import open_columns
from shared.wire.messages import Batch
from tests.sim.disk import SimDisk
from tests.sim.truth import Truth, Violation

if TYPE_CHECKING:
    from tests.sim.hub import Hub, Site
    from tests.sim.machine import Machine
    from tests.sim.process import Process
    from tests.sim.slots import Releases, SlotDisk, SlotLife


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The classes of a world.

    Attributes:
        truth: what the properties are read from.
        check_durable: asked when a batch is sent for the first time.
    """

    disk: Callable[..., SimDisk]
    journal: type[Journal]
    process: Callable[[Machine], Process]
    hub: Callable[[str, Site], Hub]
    slots: Callable[[Process, SlotDisk, Releases], SlotLife]
    truth: Callable[..., Truth]
    check_durable: Callable[[Machine, Batch], None]


def payload(klass: RecordClass, token: int, padding: int) -> bytes:
    """A record's bytes as the outbox keeps them."""
    text = f"#{token}:{'x' * padding}"
    body: Body
    match klass:
        case RecordClass.EVENT:
            body = DeviceEvent(name=text)
        case RecordClass.OUTCOME:
            body = Outcome(request=text)
        case RecordClass.RESULT:
            body = Result(request=text, model="m", version="1", variant="v", rung="full")
        case RecordClass.READING:
            body = Reading(name=text, value=1.5)
    return encode_record(body)


def token_of(body: Body) -> int:
    """The token in a record's body."""
    text = body.request if isinstance(body, Result | Outcome) else body.name
    return int(text[1:].partition(":")[0])


def check_durable(machine: Machine, batch: Batch) -> None:
    """What is sent must be on the disk: its first and its last record are looked for in what a cut would leave."""
    claim = batch.batch
    if machine.name in machine.truth.rotten:
        return  # it may be sent from memory, and its place on the disk be spoiled since
    tokens = machine.truth.of((machine.name, claim.epoch, claim.klass)).tokens
    for number in (claim.first, claim.last):
        # A record whose append was interrupted has no known number: only the batch says which it is.
        token = tokens.get(number) or _token_in(batch, number)
        if not machine.disk.holds(b"#%d:" % token, prefix=f"{claim.klass}-"):
            raise Violation(
                "undurable", f"{machine.name} sends {claim.klass}/{number} ({token}), which a cut would take"
            )


def _token_in(batch: Batch, number: int) -> int:
    return next(token_of(record.body) for record in open_columns(batch.columns).records() if record.seq == number)
