"""What goes wrong, and when it stops.

Each kind of trouble of a plan comes at random moments, as often as the plan says, somewhere in the world. Many are
armed some calls of the disk ahead, so that they strike inside the journal's work; those that struck nothing are
disarmed when the faults stop.
"""

from __future__ import annotations

from msgspec.structs import replace

from edge_agent.core.journal import JournalBounds
from shared.telemetry import RecordClass
from tests.sim.disk import SimDisk, Strike
from tests.sim.heap import World
from tests.sim.hub import Hub
from tests.sim.machine import Machine
from tests.sim.net import Broker
from tests.sim.profiles import Plan, Trouble

DAY_MS = 24 * 3_600_000


class Chaos:
    """The troubles of a world."""

    def __init__(self, *, world: World, plan: Plan, machines: list[Machine], hubs: list[Hub], broker: Broker) -> None:
        self._world = world
        self._plan = plan
        self._machines = machines
        self._hubs = hubs
        self._broker = broker
        self._images: dict[str, SimDisk] = {}

    def begin(self) -> None:
        """Plan the first of each kind."""
        for trouble, mean_ms in self._plan.troubles.items():
            self._world.after(self._world.span(mean_ms), self._happen, trouble, mean_ms)

    def _happen(self, trouble: Trouble, mean_ms: float) -> None:
        if self._world.now < self._plan.chaos_ms:
            self._strike(trouble)
            self._world.after(1 + self._world.span(mean_ms), self._happen, trouble, mean_ms)

    def _strike(self, trouble: Trouble) -> None:
        random = self._world.random
        machine = random.choice(self._machines)
        match trouble:
            case Trouble.KILL:
                if random.random() < 0.5:
                    machine.kill()
                else:
                    machine.disk.arm(Strike.KILL, calls_ahead=random.randrange(1, 12))
            case Trouble.STOP:
                machine.stop()
            case Trouble.POWER:
                machine.disk.arm(Strike.POWER, calls_ahead=random.randrange(1, 12))
            case Trouble.OUTAGE:
                machine.power_off(for_ms=1_000 + self._world.span(20_000))
            case Trouble.CUT:
                line = self._broker.lines.get(machine.name)
                if line is not None:
                    self._world.say("net", "cuts the line of", machine.name)
                    self._broker.cut(line)
            case Trouble.BROKER:
                self._kill_broker()
            case Trouble.HUB:
                random.choice(self._hubs).kill()
            case Trouble.HUB_COMMIT:
                random.choice(self._hubs).dies_at_commit = random.choice(("before", "after"))
            case Trouble.IO:
                machine.disk.arm(Strike.IO, calls_ahead=random.randrange(1, 12))
            case Trouble.FULL:
                machine.disk.arm(Strike.FULL, calls_ahead=random.randrange(1, 12))
            case _:
                self._change(trouble, machine)

    def _change(self, trouble: Trouble, machine: Machine) -> None:
        random = self._world.random
        match trouble:
            case Trouble.RESIZE:
                machine.stop()
                machine.bounds = resized(self._plan.bounds, random.choice((1, 2, 4)))
                machine.was_resized = True
            case Trouble.DROP:
                machine.drop(random.choice((RecordClass.OUTCOME, RecordClass.RESULT, RecordClass.READING)))
            case Trouble.CROWD:
                spare = max(0, machine.disk.capacity - machine.disk.used)
                machine.disk.others = random.choice((0, spare // 2, spare))
                self._world.say(machine.name, "has", f"{machine.disk.free_bytes()} bytes free")
            case Trouble.CLOCK:
                if not machine.synchronised:
                    machine.wall_error_ms = random.choice((-300 * DAY_MS, -3_600_000, 0, 3 * DAY_MS, 5000 * DAY_MS))
                    self._world.say(machine.name, "has a wall clock that is wrong by", machine.wall_error_ms)
            case Trouble.SYNC:
                machine.synchronised = not machine.synchronised
                self._world.say(machine.name, f"synchronised={machine.synchronised}")
            case Trouble.ROT:
                name = machine.disk.rot()
                if name is not None:
                    machine.truth.rotten.add(machine.name)
                    self._world.say(machine.name, "rots in", name)
            case Trouble.NEW_DISK:
                machine.power_off(for_ms=2_000)
                machine.disk.wipe()
                machine.truth.taken_away(machine.name)
                self._images.pop(machine.name, None)
                self._world.say(machine.name, "has a new disk")
            case Trouble.OLD_DISK:
                self._set_back(machine)
            case Trouble.BURST:
                for _ in range(random.randrange(10, 40)):
                    machine.put(RecordClass(random.randrange(4)), random.randrange(200))
            case _:
                raise AssertionError(trouble)

    def _set_back(self, machine: Machine) -> None:
        """Take an image; the next time, write it back."""
        image = self._images.pop(machine.name, None)
        if image is None:
            image = SimDisk(random=self._world.random)
            image.replace_with(machine.disk)
            if any(name.startswith("epoch-") for name in image.names()):
                self._images[machine.name] = image
            return
        machine.power_off(for_ms=2_000)
        machine.disk.replace_with(image)
        machine.truth.was_set_back(machine.name)
        self._world.say(machine.name, "is set back to an older image of its disk")

    def _kill_broker(self) -> None:
        if self._broker.up:
            hubs = self._broker.die()
            for hub in self._hubs:
                if hub in hubs:
                    self._world.after(self._world.span(1_000), hub.subscribe)
            self._world.after(self._world.span(8_000), self._broker.rise)

    def stop(self) -> None:
        """The faults stop: all is up, the lines are good, the disks have room, the clocks are right."""
        self._world.say("world", "heals")
        self._broker.weather = self._broker.weather.calm
        if not self._broker.up:
            self._broker.rise()
        for hub in self._hubs:
            hub.dies_at_commit = None
        for machine in self._machines:
            machine.disk.disarm()
            machine.disk.others = 0
            machine.disk.capacity = max(machine.disk.capacity, room(self._plan.bounds))
            machine.synchronised = True


def resized(bounds: JournalBounds, times: int) -> JournalBounds:
    """The same budget, in files so many times as large."""
    return replace(bounds, segment_bytes=bounds.segment_bytes * times)


def room(bounds: JournalBounds) -> int:
    """A file system that has room for the outbox."""
    return bounds.total_bytes * 2
