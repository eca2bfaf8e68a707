"""Faults of the device's process, of the hub and of the slots, as parts that take their place (tests/sim/faults.py)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Final

from msgspec.structs import replace

from cloud_hub.telemetry.rules import Stream
from cloud_hub.telemetry.taking import Received
from edge_agent.core import pump
from edge_agent.core.slot_values import FilesVerified
from shared.release import Floors
from shared.telemetry import BatchId, RecordClass
from shared.wire.messages import Batch, Verdict
from tests.fakes.telemetry_store import MemoryTransaction
from tests.sim.faulty_journal import LazyDisk
from tests.sim.hub import Hub
from tests.sim.net import Carried, Line
from tests.sim.process import Process
from tests.sim.slots import SlotLife

LAZY_MS: Final = 400

# The device


class SendsBeforeDurable(Process):
    """Wakes the pump when records are written, and promises them when they are synced, a while later."""

    def append(self, klass: RecordClass, tokens: Sequence[int], entries: Sequence[tuple[int, bytes]]) -> None:
        """Write without waiting for the disk."""
        disk = self._disk()
        disk.is_lazy = True
        try:
            super().append(klass, tokens, entries)
        finally:
            disk.is_lazy = False

    def accepted(self, klass: RecordClass, first: int, tokens: Sequence[int]) -> None:
        """Send now, promise later."""
        self.later(0, self._on_pump, pump.RecordsWaiting(klass))
        self.later(LAZY_MS, self._promise, klass, first, tokens)

    def _promise(self, klass: RecordClass, first: int, tokens: Sequence[int]) -> None:
        disk = self._disk()
        for name in disk.names():
            disk.sync(name)
        disk.sync_names()
        super().accepted(klass, first, tokens)

    def _disk(self) -> LazyDisk:
        assert isinstance(self.machine.disk, LazyDisk)
        return self.machine.disk


class SettlesOnPuback(Process):
    """Takes the broker's word for the hub's."""

    def puback(self, line: Line, ref: BatchId) -> None:
        """Let go."""
        self.settle(ref)


class SettlesOnRefusal(Process):
    """Gives up what the broker does not take for now."""

    def refused(self, line: Line, ref: BatchId, code: int) -> None:
        """Let go."""
        self.settle(ref)


class SendsInAnyOrder(Process):
    """Lets each batch wait a while of its own before it goes out."""

    def _send(self, batch: Batch) -> None:
        self.later(self.world.random.randrange(400), super()._send, batch)


class NeverSendsAgain(Process):
    """Waits for an answer without end."""

    def _start(self, key: object, delay_ms: int, action: Callable[..., None], *args: Any) -> None:
        if not (isinstance(key, tuple) and key[0] == "ack"):
            super()._start(key, delay_ms, action, *args)


# The hub


class AnswersBeforeCommit(Hub):
    """Answers when it has decided, and commits after that."""

    def take(self, transaction: MemoryTransaction, group: list[Carried]) -> list[Verdict]:
        """Decide and answer."""
        verdicts = super().take(transaction, group)
        self._answer(group, verdicts)
        return verdicts


class LocksNothing(Hub):
    """Reads and writes a device's rows while another process does."""

    def lock(self, devices: set[str]) -> bool:
        """Nobody else is there."""
        return True


class CommitsInParts(Hub):
    """Commits the rows, and then what is known of the streams; it may die between."""

    def commit(self, transaction: MemoryTransaction, group: list[Carried], verdicts: list[Verdict]) -> None:
        """The rows come first."""
        self.site.store.batches.update(transaction._batches)
        super().commit(transaction, group, verdicts)


class KnowsNothing(MemoryTransaction):
    """A store in which nothing was ever received."""

    def read(self, streams: Collection[Stream]) -> dict[Stream, Received]:
        """Nothing."""
        return {}


class KnowsTheHighest(MemoryTransaction):
    """A store that knows of each stream the highest number, and takes all below for received."""

    def read(self, streams: Collection[Stream]) -> dict[Stream, Received]:
        """What is known, without its holes."""
        known = super().read(streams)
        return {s: replace(one, here=((1, one.here[-1][1]),)) if one.here else one for s, one in known.items()}


# Slots


class TrustsAnyVersion(SlotLife):
    """Accepts an assignment whatever was accepted before."""

    def may_accept(self, version: int) -> bool:
        """Always."""
        return True


class LosesFloors(SlotLife):
    """Keeps the floors where a restart forgets them."""

    def begin(self) -> None:
        """Begin with floors at zero."""
        self._disk.floors = Floors()
        super().begin()


class TrustsItsFiles(SlotLife):
    """Takes what was fetched for what was signed."""

    def _hashed(self, key: str) -> None:
        self._handle(FilesVerified(key))


class GoesOnBlindly(SlotLife):
    """After a start goes on in the phase that was saved, as if nothing had happened."""

    def restart(self) -> None:
        """Say nothing."""
