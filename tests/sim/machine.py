"""A device's machine: its power, its clocks and its disk, over all lives of the agent on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from edge_agent.core.journal import Moment
from shared.telemetry import BatchId, RecordClass
from shared.wire.messages import Ack
from tests.sim.disk import Interrupted, PowerLost, SimDisk
from tests.sim.heap import World
from tests.sim.net import Broker, Line
from tests.sim.parts import Parts
from tests.sim.profiles import Plan
from tests.sim.slots import Releases, SlotDisk
from tests.sim.truth import Truth, Violation

if TYPE_CHECKING:
    from tests.sim.process import Process

WALL_START_MS: Final = 1_760_000_000_000
RESTART_MS: Final = 2_000
FACTORY_WALL_MS: Final = -300 * 24 * 3_600_000
"""What a machine without a clock battery believes after a start: the day it was built."""


class Machine:
    """One device over all its lives.

    Attributes:
        counted_ms: how long it was powered before this boot, as far as its disk can know: to its last write before
            each cut.
        wall_error_ms: how wrong its wall clock is.
        synchronised: whether something keeps it right; then it is.
    """

    def __init__(
        self,
        name: str,
        *,
        world: World,
        plan: Plan,
        broker: Broker,
        truth: Truth,
        parts: Parts,
        releases: Releases | None,
    ) -> None:
        self.name = name
        self.world = world
        self.plan = plan
        self.broker = broker
        self.truth = truth
        self.parts = parts
        self.disk: SimDisk = parts.disk(random=world.random, capacity=plan.capacity, tearing=plan.tearing)
        self.releases = releases
        self.slot_disk = SlotDisk()
        if world.trace is not None:
            self.disk.told = lambda what: world.say(name, "  disk:", what)
        self.aside = SimDisk(random=world.random, tearing=plan.tearing)
        self.bounds = plan.bounds
        self.was_resized = False
        self.process: Process | None = None
        self.is_powered = False
        self.counted_ms = 0
        self.wall_error_ms = 0
        self.synchronised = True
        self.boots = 0
        self.lives = 0
        self._booted_ms = 0
        self._wrote_ms = 0
        self._syncs = 0

    # Power

    def power_on(self) -> None:
        """The machine boots and starts the agent."""
        if self.is_powered:
            return
        self.is_powered = True
        self.boots += 1
        self._booted_ms = self._wrote_ms = self.world.now
        if self.world.trace is not None:
            self.world.say(self.name, "boots", f"synchronised={self.synchronised}", f"wall={self.wall_error_ms:+}")
        self.start()

    def power_off(self, *, for_ms: int) -> None:
        """The power goes now."""
        if not self.is_powered:
            return
        self.counted_ms += self._wrote_ms - self._booted_ms
        self.is_powered = False
        self._end()
        self.disk.lose_power()
        self.aside.lose_power()
        self.world.say(self.name, "loses its power", f"{for_ms} ms")
        if self.plan.troubles and self.world.random.random() < 0.5:
            self.wall_error_ms = FACTORY_WALL_MS - self.world.now
            self.synchronised = False
        self.world.after(for_ms, self.power_on)

    def total_up_ms(self) -> int:
        """How long it was powered in all, as far as its disk can know."""
        return self.counted_ms + (self.world.now - self._booted_ms if self.is_powered else 0)

    def moment(self) -> Moment:
        """What its clocks say."""
        now = self.world.now
        wall_ms = WALL_START_MS + now + (0 if self.synchronised else self.wall_error_ms)
        return Moment(f"boot-{self.boots}", now - self._booted_ms, wall_ms, self.synchronised)

    # The process

    def start(self) -> None:
        """Start the agent, if there is none."""
        if not self.is_powered or self.process is not None:
            return
        self.lives += 1
        process = self.process = self.parts.process(self)
        process.guarded(process.begin)

    def kill(self) -> None:
        """The agent is killed; something starts it again."""
        if self.process is not None:
            self.world.say(self.name, "is killed")
            self._end()
            self.world.after(self.world.span(RESTART_MS), self.start)

    def stop(self) -> None:
        """The agent is stopped: it closes its journal. Something starts it again."""
        process = self.process
        if process is not None and process.is_open:
            self.world.say(self.name, "is stopped")
            process.guarded(process.close)
            if self.process is process:
                self._end()
                self.world.after(self.world.span(RESTART_MS), self.start)

    def drop(self, klass: RecordClass) -> None:
        """A person drops what waits of this class."""
        process = self.process
        if process is not None and process.is_open:
            process.guarded(process.drop, klass)

    def ended(self, why: str) -> None:
        """The agent has ended by itself, because it cannot go on."""
        self.world.say(self.name, "ends", why)
        self._end()
        self.world.after(RESTART_MS + self.world.span(RESTART_MS), self.start)

    def interrupted(self, how: Interrupted) -> None:
        """The disk interrupted the process in a call."""
        if isinstance(how, PowerLost):
            self.power_off(for_ms=500 + self.world.span(3_000))
        else:
            self.kill()

    def _end(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.end()

    # Lines

    def lost(self, line: Line) -> None:
        """The line is gone."""
        if self.process is not None:
            self.process.guarded(self.process.lost, line)

    def acked(self, line: Line, ack: Ack) -> None:
        """The hub's answer came."""
        if self.process is not None:
            self.process.guarded(self.process.acked, line, ack)

    def puback(self, line: Line, ref: BatchId) -> None:
        """The broker has the message."""
        if self.process is not None:
            self.process.guarded(self.process.puback, line, ref)

    def refused(self, line: Line, ref: BatchId, code: int) -> None:
        """The broker does not take the message."""
        if self.process is not None:
            self.process.guarded(self.process.refused, line, ref, code)

    # Applications

    def put(self, klass: RecordClass, padding: int) -> None:
        """An application puts a record; nobody accepts it while there is no agent."""
        process = self.process
        if process is not None and process.is_open:
            process.put(klass, self.truth.token(), padding)

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits here, as far as the agent knows."""
        process = self.process
        return process is not None and process.is_idle

    @property
    def has_release(self) -> bool:
        """Whether the slot is at rest with what it should serve, if it takes releases."""
        process = self.process
        return self.releases is None or (
            process is not None and process.slots is not None and process.slots.is_at_rest()
        )

    def check(self) -> None:
        """What must hold at every step; asked after each that may have written."""
        if self.disk.syncs != self._syncs:
            self._syncs, self._wrote_ms = self.disk.syncs, self.world.now
        if self.disk.most_used > self.bounds.total_bytes and not self.was_resized:
            raise Violation("quota", f"{self.name} has used {self.disk.most_used} of {self.plan.bounds.total_bytes}")
