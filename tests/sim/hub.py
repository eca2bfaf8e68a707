"""The hub: one store that outlives everything, and processes that take what the broker hands them.

Rules of this file:
1. A process gathers what has come, takes it in one transaction, commits a while later, and answers after that. It may
   die at any moment; then an open transaction leaves nothing behind, and what was committed is not answered.
2. Until its commit a transaction has the rows of its devices to itself, as `taking.Store.read` promises.

The store is the fake that passes the same contract suite as SQLite and PostgreSQL.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Final

from cloud_hub.telemetry.rules import TelemetryRefused, open_batch
from cloud_hub.telemetry.taking import CONFLICT, NEW_EPOCH, take_all
from shared.ids import DeviceId
from shared.wire.messages import Ack, Verdict
from tests.fakes.telemetry_store import MemoryTelemetry, MemoryTransaction
from tests.sim.heap import World
from tests.sim.net import Broker, Carried
from tests.sim.profiles import Plan
from tests.sim.truth import Truth, Violation

MAX_GROUP: Final = 16
GATHER_MS: Final = 5
RESTART_MS: Final = 4_000


class Site:
    """What the hub's processes share.

    Attributes:
        store: the database.
        locked: which process has a device's rows; `waiting` are those that want some of them.
    """

    def __init__(self, *, world: World, plan: Plan, broker: Broker, truth: Truth) -> None:
        self.world = world
        self.plan = plan
        self.broker = broker
        self.truth = truth
        self.store = MemoryTelemetry()
        self.locked: dict[str, Hub] = {}
        self.waiting: list[Hub] = []


class Hub:
    """One process of the hub over all its lives."""

    def __init__(self, name: str, site: Site) -> None:
        self.name = name
        self.site = site
        self.world = site.world
        self.is_up = False
        self.dies_at_commit: str | None = None
        self._life = 0
        self._inbox: list[Carried] = []
        self._is_busy = False

    # Life

    def start(self) -> None:
        """Begin a life, and take a share of the subscription."""
        if self.is_up:
            return
        self.is_up = True
        self.world.say(self.name, "starts")
        self.subscribe()

    def subscribe(self) -> None:
        """Take a share, now or when there is a broker again."""
        if self.is_up and not self.site.broker.subscribe(self):
            self._later(500, self.subscribe)

    def kill(self) -> None:
        """The process is gone, and what it held in memory."""
        if not self.is_up:
            return
        self.world.say(self.name, "dies", f"inbox={len(self._inbox)}")
        self.is_up = False
        self._life += 1
        self._inbox.clear()
        self._is_busy = False
        self.dies_at_commit = None
        self._unlock()
        self.site.broker.leave(self)
        self.world.after(self.world.span(RESTART_MS), self.start)

    def _later(self, delay_ms: int, action: Callable[..., None], *args: Any) -> None:
        self.world.after(delay_ms, self._in_life, self._life, action, args)

    def _in_life(self, life: int, action: Callable[..., None], args: tuple[Any, ...]) -> None:
        if life == self._life and self.is_up:
            action(*args)

    # Batches

    def receive(self, message: Carried) -> None:
        """A message came."""
        self._inbox.append(message)
        if not self._is_busy:
            self._is_busy = True
            self._later(GATHER_MS, self._begin)

    def _begin(self) -> None:
        group = self._inbox[:MAX_GROUP]
        if not self.lock({message.device for message in group}):
            self.site.waiting.append(self)
            return
        del self._inbox[:MAX_GROUP]
        transaction = MemoryTransaction(self.site.store)
        verdicts = self.take(transaction, group)
        self._later(self.world.span(self.site.plan.hub_commit_ms), self.commit, transaction, group, verdicts)

    def lock(self, devices: set[str]) -> bool:
        """Have the rows of these devices to oneself; False when another process has some of them."""
        locked = self.site.locked
        if any(locked.get(device, self) is not self for device in devices):
            return False
        locked.update(dict.fromkeys(devices, self))
        return True

    def _unlock(self) -> None:
        site = self.site
        site.locked = {device: hub for device, hub in site.locked.items() if hub is not self}
        waiting, site.waiting = site.waiting, []
        for hub in waiting:
            if hub is not self:
                hub.try_again()

    def try_again(self) -> None:
        """Rows that this process waits for may have become free."""
        self._later(0, self._begin)

    def take(self, transaction: MemoryTransaction, group: list[Carried]) -> list[Verdict]:
        """What becomes of these messages, if the transaction is committed."""
        verdicts: dict[int, Verdict] = {}
        opened = []
        for index, message in enumerate(group):
            try:
                opened.append((index, open_batch(DeviceId(message.device), message.batch)))
            except TelemetryRefused as refused:
                verdicts[index] = Verdict(batch=message.batch.batch, status="refused", code=refused.code)
        taken = take_all(transaction, [batch for _, batch in opened], at_ms=self.world.now)
        for (index, batch), one in zip(opened, taken, strict=True):
            verdicts[index] = Verdict(batch=batch.id, status=one.status, code=one.code)
        return [verdicts[index] for index in range(len(group))]

    def commit(self, transaction: MemoryTransaction, group: list[Carried], verdicts: list[Verdict]) -> None:
        """Commit, then answer; a death may come before or between."""
        if self.dies_at_commit == "before":
            self.kill()
            return
        transaction.commit()
        self._unlock()
        self._tell(group, verdicts)
        if self.dies_at_commit == "after":
            self.kill()
            return
        self._later(self.world.span(2), self._answer, group, verdicts)
        self._is_busy = bool(self._inbox)
        if self._is_busy:
            self._later(GATHER_MS, self._begin)

    def _tell(self, group: list[Carried], verdicts: list[Verdict]) -> None:
        for message, verdict in zip(group, verdicts, strict=True):
            claim = verdict.batch
            if self.world.trace is not None:
                what = "" if message.batch.gap is None else f"gap: {message.batch.gap.reason}"
                about = f"{message.device} {claim.klass}/{claim.first}-{claim.last}"
                self.world.say(self.name, "commits", about, verdict.status, verdict.code, what)
            if verdict.status == "refused":
                self.site.truth.refused_by_hub(message.device, claim, verdict.code)
            else:
                fresh = verdict.status == "stored" and message.batch.gap is None
                self.site.truth.committed(message.device, claim, fresh=fresh)

    def _answer(self, group: list[Carried], verdicts: list[Verdict]) -> None:
        by_device: dict[str, list[Verdict]] = {}
        for message, verdict in zip(group, verdicts, strict=True):
            by_device.setdefault(message.device, []).append(verdict)
        for message in group:
            self.site.broker.done(self, message)
        for device, theirs in by_device.items():
            self.site.broker.answer(device, Ack(verdicts=tuple(theirs)))


def what_is_stored(site: Site, token_of: Callable[[Any], int]) -> tuple[Any, Any]:
    """What the hub has of each stream in the end: (number, token) of every record, and what it counts as lost."""
    stored = {}
    for stream in site.store.batches:
        records = site.store.records(stream)
        stored[stream.device, stream.epoch, int(stream.klass)] = [(r.seq, token_of(r.body)) for r in records]
    gaps = {}
    for stream, known in site.store.received.items():
        name = (stream.device, stream.epoch, int(stream.klass))
        gaps[name] = [(lost.first, lost.last) for lost in known.lost]
        numbers = {n for first, last in known.here for n in range(first, last + 1)}
        if numbers != {number for number, _ in stored.get(name, ())} or known.records != len(numbers):
            raise Violation("twice", f"the hub's account of {name} is not what its rows hold")
    return stored, gaps


def check_reports(site: Site) -> None:
    """Another epoch of a device, and a conflict, each is told once; raises Violation."""
    told = Counter((note.device, note.action) for note in site.store.notes)
    epochs: dict[str, set[str]] = {}
    conflicts: Counter[str] = Counter()
    for stream, known in site.store.received.items():
        epochs.setdefault(stream.device, set()).add(stream.epoch)
        conflicts[stream.device] += known.conflicts > 0
    for device, mine in epochs.items():
        if told[DeviceId(device), NEW_EPOCH] != len(mine) - 1:
            raise Violation("reported", f"{device} had {len(mine)} epochs: {told}")
        if told[DeviceId(device), CONFLICT] != conflicts[device]:
            raise Violation("reported", f"{device} had conflicts in {conflicts[device]} streams: {told}")
        site.truth.reached["epochs"] += len(mine) - 1
        site.truth.reached["conflicts"] += conflicts[device]
