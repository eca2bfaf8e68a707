"""One seed: build the world, let things go wrong, let it heal, and see what is true.

outcome = run("mixed", 17)
outcome = run("power", 4, parts=…, traced=True)
"""

from __future__ import annotations

import hashlib
import traceback
from dataclasses import dataclass, field
from typing import Final

import msgspec

from edge_agent.adapters.buried import BuriedBatch
from edge_agent.adapters.journal import Journal
from shared.limits import MIB
from shared.telemetry import RecordClass
from tests.sim.chaos import Chaos
from tests.sim.disk import SimDisk
from tests.sim.heap import World
from tests.sim.hub import Hub, Site, check_reports, what_is_stored
from tests.sim.machine import Machine
from tests.sim.net import Broker
from tests.sim.parts import Parts, check_durable, token_of
from tests.sim.process import TICK_MS, Process
from tests.sim.profiles import Plan, plan_of
from tests.sim.slots import BAD, GOOD, Releases, SlotLife
from tests.sim.truth import Stream, Truth, Violation

IDLE_CHECK_MS = 500


@dataclass(slots=True)
class Outcome:
    """What came of a seed.

    Attributes:
        violation: the property that does not hold, and how; None when all do.
        figures: what happened, counted.
        trace: lines, when they were asked for.
    """

    profile: str
    seed: int
    violation: str | None
    figures: dict[str, int] = field(default_factory=dict)
    trace: list[str] = field(default_factory=list)
    world_profile: str = ""

    @property
    def name(self) -> str:
        """The violated property's name; empty when all hold."""
        return "" if self.violation is None else self.violation.partition(":")[0]

    @property
    def digest(self) -> str:
        """The hash of the trace and of what came of it."""
        text = "\n".join([*self.trace, str(self.violation), str(sorted(self.figures.items()))])
        return hashlib.sha256(text.encode()).hexdigest()


HONEST: Final = Parts(
    disk=SimDisk,
    journal=Journal,
    process=Process,
    hub=Hub,
    slots=SlotLife,
    truth=Truth,
    check_durable=check_durable,
)


class House:
    """A world, put together."""

    def __init__(self, plan: Plan, world: World, parts: Parts) -> None:
        self.plan = plan
        self.world = world
        linger_ms = max(plan.load.linger_ms, 0)
        self.truth = parts.truth(ttl_ms=dict(plan.bounds.ttl_ms), ttl_slack_ms=2 * TICK_MS + linger_ms)
        self.broker = Broker(world, plan.weather, disorder=self.truth.disordered)
        self.site = Site(world=world, plan=plan, broker=self.broker, truth=self.truth)
        self.hubs = [parts.hub(f"hub{n}", self.site) for n in range(plan.hubs)]
        self.releases = Releases() if plan.slots else None
        self.machines = [
            Machine(
                f"dev{n}",
                world=world,
                plan=plan,
                broker=self.broker,
                truth=self.truth,
                parts=parts,
                releases=self.releases,
            )
            for n in range(plan.devices)
        ]
        self.chaos = Chaos(world=world, plan=plan, machines=self.machines, hubs=self.hubs, broker=self.broker)

    def live(self) -> None:
        """From the first start to the last record's arrival; raises Violation."""
        world, plan = self.world, self.plan
        for hub in self.hubs:
            hub.start()
        for machine in self.machines:
            world.after(world.span(500), machine.power_on)
            self._load(machine)
        if self.releases is not None:
            self._publish(self.releases)
        self.chaos.begin()
        world.run(plan.chaos_ms)
        self.chaos.stop()
        deadline_ms = world.now + plan.heal_ms
        while world.now < deadline_ms:
            world.run(world.now + IDLE_CHECK_MS)
            if self._is_settled():
                break
        else:
            raise Violation("pending", f"still waiting {plan.heal_ms} ms after the faults stopped: {self._pending()}")
        for machine in self.machines:
            machine.check()
        stored, gaps = what_is_stored(self.site, token_of)
        self.truth.judge(stored, gaps, self._aside())
        check_reports(self.site)

    def _aside(self) -> dict[Stream, set[int]]:
        found: dict[Stream, set[int]] = {}
        for machine in self.machines:
            for name in machine.aside.names():
                letter = msgspec.msgpack.decode(machine.aside.read(name, 0, MIB), type=BuriedBatch)
                if letter.gap is None:
                    continue  # its numbers are in a gap, and that is at the hub, or was refused and lies here too
                claim = letter.batch
                numbers = found.setdefault((machine.name, claim.epoch, claim.klass), set())
                numbers.update(range(claim.first, claim.last + 1))
        return found

    def _load(self, machine: Machine) -> None:
        world, load = self.world, self.plan.load
        when = world.now
        for _ in range(load.records):
            when += world.span(load.pause_ms)
            klass = world.random.choices(tuple(RecordClass), load.weights)[0]
            if when < self.plan.chaos_ms:
                world.at(when, machine.put, klass, world.random.randrange(load.padding + 1))

    def _publish(self, releases: Releases) -> None:
        world = self.world
        for _ in range(world.random.randrange(1, 6)):
            nature = GOOD if world.random.random() < 0.6 else world.random.choice(BAD)
            world.at(world.random.randrange(self.plan.chaos_ms), releases.publish, nature)

    def _is_settled(self) -> bool:
        return all(hub.is_up for hub in self.hubs) and all(
            machine.is_idle and machine.has_release for machine in self.machines
        )

    def _pending(self) -> str:
        lines = []
        for machine in self.machines:
            process = machine.process
            if process is None or not process.is_open:
                lines.append(f"{machine.name} has no agent")
            else:
                depth = process.store.depth(machine.moment())
                lines.append(f"{machine.name} {dict(depth.records)} idle={process.is_idle}")
                if process.slots is not None and not machine.has_release:
                    raise Violation("stuck", f"{machine.name}: {process.slots.describe()}")
        return "; ".join(lines)


def run(profile: str, seed: int, *, parts: Parts = HONEST, traced: bool = False) -> Outcome:
    """Let this seed of this profile happen."""
    world = World(f"{profile}:{seed}", traced=traced)
    plan = plan_of(profile, world.random)
    house = House(plan, world, parts)
    violation: str | None = None
    try:
        house.live()
    except Violation as broken:
        violation = str(broken)
    except Exception as error:  # whatever the system raises and nobody expected is a finding, with its place
        place = traceback.extract_tb(error.__traceback__)[-1]
        violation = f"crash: {type(error).__name__}: {error} ({place.filename.rpartition('/')[2]}:{place.lineno})"
    truth = house.truth
    figures = {
        "records": len(truth.accepted),
        "lives": sum(machine.lives for machine in house.machines),
        "boots": sum(machine.boots for machine in house.machines),
        "events": world.events,
        "virtual_ms": world.now,
        "disk_calls": sum(machine.disk.calls for machine in house.machines),
        **truth.reached,
    }
    return Outcome(profile, seed, violation, figures, world.trace or [], plan.profile)
