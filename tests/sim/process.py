"""One life of the agent: the real deciders, and a driver that does what the real one does.

Rules of this file:
1. What the deciders say is carried out in order, one effect before the next, and answered as events. Nothing is kept
   that a crash would not take, but on the disk.
2. Whatever a process has planned dies with it. An interruption may come out of any call of the disk.
3. What the truth is told, it is told at the moment at which the system promises it: accepted when `append` returned,
   sent when the line takes it, settled before the journal is told.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from edge_agent.adapters.buried import Buried
from edge_agent.adapters.journal import Journal
from edge_agent.adapters.records import RecordStore
from edge_agent.core import link, pump
from edge_agent.core.slot_values import Note
from shared.errors import StorageError
from shared.telemetry import BatchId, RecordClass
from shared.wire.messages import Ack, Batch
from tests.sim.disk import Interrupted
from tests.sim.machine import Machine
from tests.sim.net import Line
from tests.sim.parts import payload
from tests.sim.truth import Birth

if TYPE_CHECKING:
    from tests.sim.slots import SlotLife

TICK_MS: Final = 1_000
MAX_COMMIT_RECORDS: Final = 8
BURIED_BYTES: Final = 1024 * 1024


class Process:
    """One life of the agent."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.world = machine.world
        self.truth = machine.truth
        self.journal: Journal
        self.store: RecordStore
        self.is_open = False
        self._is_alive = True
        self._link = link.Link()
        self._pump = pump.Pump()
        self._line: Line | None = None
        self._timers: dict[object, int] = {}
        self._timer = 0
        self._waiting: list[tuple[RecordClass, int, bytes]] = []
        self._is_committing = False
        self.slots: SlotLife | None = None

    # Life

    def begin(self) -> None:
        """Open the journal and connect."""
        machine = self.machine
        try:
            self.journal = machine.parts.journal.open(
                machine.disk, machine.bounds, moment=machine.moment(), draw=self.world.random.randbytes
            )
        except StorageError as error:
            machine.ended(f"journal: {error.message}")
            return
        self.store = RecordStore(self.journal, buried=Buried(machine.aside, most_bytes=BURIED_BYTES))
        self.is_open = True
        machine.check()
        self.truth.opened(machine.name, self.store.epoch)
        self.later(TICK_MS, self._tick)
        self._on_link(link.StartLink())
        if machine.releases is not None:
            self.slots = machine.parts.slots(self, machine.slot_disk, machine.releases)
            self.slots.begin()

    def end(self) -> None:
        """Nothing of this life happens any more."""
        self._is_alive = False
        if self._line is not None:
            self.machine.broker.hang_up(self._line)

    def close(self) -> None:
        """Leave as one should."""
        try:
            self.store.close(self.machine.moment())
        except StorageError as error:
            self.world.say(self.machine.name, "cannot close", error.message)

    def drop(self, klass: RecordClass) -> None:
        """Drop what waits of this class."""
        try:
            dropped = self.store.drop(klass, moment=self.machine.moment())
        except StorageError as error:
            self.world.say(self.machine.name, "cannot drop", klass.name, error.message)
        else:
            self.world.say(self.machine.name, "drops", klass.name, dropped)
        self._on_pump(pump.RecordsWaiting(klass))
        self.machine.check()

    def guarded(self, action: Callable[..., None], *args: Any) -> None:
        """Carry something out in this life, if it still goes on."""
        if not self._is_alive:
            return
        try:
            action(*args)
        except Interrupted as how:
            self.machine.interrupted(how)

    def later(self, delay_ms: int, action: Callable[..., None], *args: Any) -> None:
        """Carry something out after this time, in this life."""
        self.world.after(delay_ms, self.guarded, action, *args)

    @property
    def is_online(self) -> bool:
        """Whether the link is up."""
        return self._link.phase is link.LinkPhase.ONLINE

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits."""
        if not self.is_open or self._waiting or self._is_committing:
            return False
        chains = self.store.depth(self.machine.moment())
        return not any(chains.records.values()) and self._pump_rests()

    def _pump_rests(self) -> bool:
        quiet = pump.LanePhase.QUIET
        return all(lane.phase is quiet and not lane.sent for lane in self._pump.lanes)

    def _tick(self) -> None:
        try:
            self.store.tick(self.machine.moment())
        except StorageError as error:
            self.world.say(self.machine.name, "cannot tick", error.message)
        self.machine.check()
        self.later(TICK_MS, self._tick)

    # Records

    def put(self, klass: RecordClass, token: int, padding: int) -> None:
        """Keep a record; it is promised once it is durable."""
        self._waiting.append((klass, token, payload(klass, token, padding)))
        if not self._is_committing:
            self._is_committing = True
            self.later(self.machine.plan.load.linger_ms + self.world.span(self.machine.plan.commit_ms), self._commit)

    def _commit(self) -> None:
        waiting, self._waiting = self._waiting, []
        self._is_committing = False
        at_ms = self.machine.moment().wall_ms
        for klass in RecordClass:
            mine = [(token, data) for known, token, data in waiting if known is klass]
            while mine:
                fits, size = 0, 0
                while fits < min(len(mine), MAX_COMMIT_RECORDS) and size <= self.machine.bounds.segment_bytes // 2:
                    size += len(mine[fits][1])
                    fits += 1
                some, mine = mine[:fits], mine[fits:]
                self.append(klass, [token for token, _ in some], [(at_ms, data) for _, data in some])

    def append(self, klass: RecordClass, tokens: Sequence[int], entries: Sequence[tuple[int, bytes]]) -> None:
        """One commit of one class."""
        machine = self.machine
        try:
            first = self.store.append(klass, entries, moment=machine.moment())
        except StorageError as error:
            if self.world.trace is not None:
                self.world.say(machine.name, "cannot keep", klass.name, tokens, error.message)
            return
        finally:
            machine.check()
        self.accepted(klass, first, tokens)

    def accepted(self, klass: RecordClass, first: int, tokens: Sequence[int]) -> None:
        """The records are durable: promise them, and wake the pump."""
        machine = self.machine
        if self.world.trace is not None:
            self.world.say(machine.name, "keeps", f"{int(klass)}/{first}-{first + len(tokens) - 1}", tokens)
        birth = Birth(self.world.now, machine.total_up_ms())
        self.truth.accepted_at((machine.name, self.store.epoch, int(klass)), first, tokens, birth)
        self.later(0, self._on_pump, pump.RecordsWaiting(klass))

    # The pump

    def _on_pump(self, event: pump.PumpEvent) -> None:
        decision = pump.decide(self._pump, event)
        self._pump = decision.state
        for effect in decision.effects:
            match effect:
                case pump.LoadBatch(klass, after, ask):
                    self.later(self.world.random.randrange(3), self._load, klass, after, ask)
                case pump.SendBatch(batch):
                    self._send(batch)
                case pump.Settle(batch):
                    self.settle(batch)
                case pump.Bury(batch, reason):
                    self._bury(batch, reason)
                case pump.StartAckTimer(klass, digest, delay_ms):
                    self._start(("ack", klass), delay_ms, self._on_pump, pump.AckTimedOut(klass, digest))
                case pump.StopAckTimer(klass):
                    self._timers.pop(("ack", klass), None)
                case pump.StartRestTimer(klass, delay_ms):
                    self._start(("rest", klass), delay_ms, self._on_pump, pump.RestOver(klass))
                case pump.StopRestTimer(klass):
                    self._timers.pop(("rest", klass), None)
                case Note():
                    self.machine.put(RecordClass.EVENT, 0)

    def _load(self, klass: RecordClass, after: int, ask: int) -> None:
        machine = self.machine
        try:
            batch = self.store.load(klass, after=after, moment=machine.moment())
        except StorageError as error:
            self.world.say(machine.name, "cannot load", klass.name, error.message)
            self._on_pump(pump.StorageRefused(klass))
            return
        if batch is None:
            self._on_pump(pump.NothingWaiting(klass, ask))
            return
        stream, claim = (machine.name, self.store.epoch, int(klass)), batch.batch
        if batch.gap is None:
            self.truth.loaded(stream, claim.first, claim.last, up_ms=machine.total_up_ms())
        elif batch.gap.reason == "expired":
            self.truth.expired(stream, claim.first, claim.last, now_ms=self.world.now)
        self._on_pump(pump.BatchReady(batch, ask))

    def _send(self, batch: Batch) -> None:
        line, machine = self._line, self.machine
        if line is None or self.world.chance(machine.plan.busy):
            self.later(0, self._on_pump, pump.NotTaken(batch.batch))
            return
        if self.world.trace is not None:
            gap = "" if batch.gap is None else f"gap: {batch.gap.reason}"
            self.world.say(machine.name, "sends", _text(batch.batch), gap)
        if self.truth.sent(machine.name, batch):
            machine.parts.check_durable(machine, batch)
        machine.broker.publish(line, batch)

    def settle(self, batch: BatchId) -> None:
        """Let go of what the hub has."""
        if self.world.trace is not None:
            self.world.say(self.machine.name, "settles", _text(batch))
        self.truth.settled(self.machine.name, batch)
        try:
            self.store.settle(batch)
        except StorageError:
            self.later(0, self._on_pump, pump.StorageRefused(RecordClass(batch.klass)))
        self.machine.check()

    def _bury(self, batch: BatchId, reason: str) -> None:
        self.world.say(self.machine.name, "buries", _text(batch), reason)
        self.truth.buried(self.machine.name, batch)
        try:
            self.store.bury(batch, reason=reason, moment=self.machine.moment())
        except StorageError:
            self.later(0, self._on_pump, pump.StorageRefused(RecordClass(batch.klass)))

    # The link

    def _on_link(self, event: link.LinkEvent) -> None:
        was_online = self._link.phase is link.LinkPhase.ONLINE
        decision = link.decide(self._link, event)
        self._link = decision.state
        for effect in decision.effects:
            match effect:
                case link.Connect():
                    self.machine.broker.connect(self.machine, answer=self._connected)
                case link.Announce():
                    self._on_pump(pump.WentOnline())
                case link.Disconnect():
                    if self._line is not None:
                        self.machine.broker.hang_up(self._line)
                case link.StartTimer(delay_ms):
                    self._start("link", delay_ms, self._on_link, link.TimerFired())
                case link.StopTimer():
                    self._timers.pop("link", None)
        if was_online and self._link.phase is not link.LinkPhase.ONLINE:
            self._on_pump(pump.WentOffline())

    def _connected(self, line: Line | None) -> None:
        if not self._is_alive:
            if line is not None:
                self.machine.broker.hang_up(line)
            return
        if line is None:
            self._on_link(link.ConnectFailed(jitter=self.world.random.random()))
            return
        self._line = line
        self.world.say(self.machine.name, "connected", line.number)
        self._on_link(link.Connected())

    def lost(self, line: Line) -> None:
        """The line is gone."""
        if line is self._line:
            self._line = None
            self.world.say(self.machine.name, "hears that its line is cut")
            self._on_link(link.Lost(jitter=self.world.random.random()))

    def acked(self, line: Line, ack: Ack) -> None:
        """The hub has answered."""
        if line is self._line:
            self._on_pump(pump.AckArrived(ack))

    def puback(self, line: Line, ref: BatchId) -> None:
        """The broker has the message."""
        if line is self._line:
            self._on_pump(pump.Taken(ref))

    def refused(self, line: Line, ref: BatchId, code: int) -> None:
        """The broker does not take the message."""
        if line is self._line:
            if code in pump.FOR_GOOD:
                self.truth.buried(self.machine.name, ref)
            self._on_pump(pump.PublishRefused(batch=ref, code=code, jitter=self.world.random.random()))

    # Timers

    def _start(self, key: object, delay_ms: int, action: Callable[..., None], *args: Any) -> None:
        self._timer += 1
        self._timers[key] = self._timer
        self.later(delay_ms, self._fire, key, self._timer, action, args)

    def _fire(self, key: object, number: int, action: Callable[..., None], args: tuple[Any, ...]) -> None:
        if self._timers.get(key) == number:
            del self._timers[key]
            action(*args)


def _text(batch: BatchId) -> str:
    return f"{batch.klass}/{batch.first}-{batch.last}"
