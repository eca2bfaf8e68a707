"""The rollouts room over a real database and the real releases room, with a fleet that behaves as the test says.

Devices are simulated: `deliver` lets each of them act on the assignment that the releases room has signed for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cloud_hub.ground.bus import Bus
from cloud_hub.ground.metrics import Metrics
from cloud_hub.releases.desk import Outcome, Selector
from cloud_hub.rollouts.desk import Desk
from shared.errors import OutriderError
from shared.ids import DeviceId
from shared.rollout import ENDED, RolloutView, parse_spec
from shared.sketch import Sketch, sketch_of
from tests.fakes.clock import FakeClock
from tests.fakes.release_room import ReleaseRoom

OLD, NEW = "1.0.0", "1.1.0"
MINUTE_MS = 60_000


@dataclass(frozen=True, slots=True)
class FakeFigure:
    """Figures of one version on one device."""

    device: DeviceId
    version: str
    answered: int
    right: int
    wrong: int
    latency: Sketch


@dataclass(slots=True)
class FakeFigures:
    """The telemetry room, as far as rollouts ask; `asked` is what for: since when, of whom."""

    kept: dict[tuple[str, str], FakeFigure]
    asked: list[tuple[int, frozenset[DeviceId]]] = field(default_factory=list)
    gate: asyncio.Event | None = None
    takes_ms: int = 0
    clock: FakeClock | None = None

    async def figures(
        self, *, family: str, since_ms: int, devices: Iterable[DeviceId] | None = None
    ) -> list[FakeFigure]:
        """As the telemetry desk."""
        wanted = None if devices is None else set(devices)
        self.asked.append((since_ms, frozenset(wanted or ())))
        if self.gate is not None:
            await self.gate.wait()
        if self.clock is not None:
            self.clock.advance(self.takes_ms)
        return [figure for figure in self.kept.values() if wanted is None or figure.device in wanted]

    def say(self, device: str, version: str, *, right: int, wrong: int, took_us: int = 2000) -> None:
        """What the device said of the version so far."""
        total = right + wrong
        latency = sketch_of([took_us] * total)
        self.kept[(device, version)] = FakeFigure(DeviceId(device), version, total, right, wrong, latency)


class Cut(Exception):
    """The hub's process ends here."""


@dataclass(slots=True)
class Power:
    """Ends the process before or after one step of it: a write, or the making of assignments."""

    left: int = 10**9
    when: str = "before"
    steps: int = 0

    def step(self, when: str) -> None:
        """Count a step, and end the process when it is the one."""
        if when == "before":
            self.steps += 1
        if self.steps == self.left and when == self.when:
            raise Cut


class RolloutRoom:
    """Everything together; `close` when done."""

    def __init__(self, root: Path, *, devices: int = 4) -> None:
        self.releases = ReleaseRoom(root)
        self.clock = self.releases.clock
        self.database = self.releases.database
        self.figures = FakeFigures({})
        self.power = Power()
        self.link: int | None = 0
        self.refusals: list[OutriderError] = []
        self.away: set[str] = set()
        self.manifests: dict[str, str] = {}
        for version in (OLD, NEW):
            row = self.releases.make_ready(version)
            self.manifests[version] = row.files[0].digest
            asyncio.run(self.releases.publish(version))
        for number in range(devices):
            self.add(f"dev-{number}")
        self.bus = Bus()
        self.desk = self.open_desk()

    def add(self, name: str, *, version: str = OLD, **changes: Any) -> None:
        """A device that runs a version and has said how it did."""
        self.releases.fleet.add(name, last_seen_ms=self.clock.wall, **changes)
        if version:
            self.report(name, version=version)
            self.figures.say(name, version, right=195, wrong=5)

    def open_desk(self) -> Desk:
        """Another start of the hub over the same data: who was connected is forgotten, births tell it anew."""
        for name, device in self.releases.fleet.devices.items():
            if device.online and hasattr(self, "desk"):
                self.releases.fleet.devices[name] = replace(device, online=False)
                self.away.add(name)
        desk = Desk(
            database=self.database,
            clock=self.clock,
            metrics=Metrics(),
            fleet=self.releases.fleet,
            releases=self.releases.desk,
            figures=self.figures,
            bus=self.bus,
            assigner=self,
            link=lambda: self.link,
        )
        write = self.database.write

        async def watched(work: Any) -> Any:
            self.power.step("before")
            result = await write(work)
            self.power.step("after")
            return result

        # The controller's own writes; the releases room keeps its own reference to the database's method.
        desk.controller._database = _Watched(self.database, watched)  # type: ignore[assignment]
        return desk

    async def assign(self, selector: Selector, *, actor: str) -> Outcome:
        """As the releases room, with power cuts around it."""
        self.power.step("before")
        if self.refusals:
            raise self.refusals.pop(0)
        outcome = await self.releases.desk.assigning.assign(selector, actor=actor)
        self.power.step("after")
        return outcome

    def start(self, **fields: Any) -> RolloutView:
        """Start a rollout of the new version."""
        return asyncio.run(self.desk.start(parse_spec(self.spec(**fields)), actor="token:ann"))

    def spec(self, **fields: Any) -> dict[str, Any]:
        """What the tests ask for where they do not say otherwise."""
        least = {"family": "digits", "version": NEW, "soak_s": 60, "deadline_s": 600, "min_answers": 5}
        return {**least, "max_harmed": 0, "stages": [1, "100%"], **fields}

    def look(self) -> None:
        """One look of the controller."""
        asyncio.run(self.desk.controller.look())

    def connect(self) -> None:
        """Devices that the hub has forgotten are born again."""
        for name in sorted(self.away):
            device = self.releases.fleet.devices[name]
            self.releases.fleet.devices[name] = replace(device, online=True, last_seen_ms=self.clock.wall)
        self.away.clear()

    def report(self, name: str, *, version: str, **fields: Any) -> None:
        """The device's newest report of its slot."""
        slot = {"family": "digits", "phase": "committed", "version": version}
        slot |= {"manifest": self.manifests.get(version, ""), **fields}
        device = self.releases.fleet.devices[name]
        self.releases.fleet.add(
            name,
            labels=device.labels,
            profile=device.profile,
            online=device.online,
            last_seen_ms=self.clock.wall,
            assignment_version=device.assignment_version,
            reported={"models": [slot]},
        )

    def deliver(self, behave: Callable[[RolloutRoom, str], None]) -> None:
        """Let every device that is here act on its newest assignment."""
        rows = asyncio.run(self.releases.desk.assigning.page(after="", limit=1000))
        for row in rows:
            name, assignment = row.assignment.device, row.assignment
            device = self.releases.fleet.devices[name]
            if not device.online or device.assignment_version >= assignment.version:
                continue
            version = next(model.version for model in assignment.models if model.family == "digits")
            self.releases.fleet.add(
                name,
                labels=device.labels,
                profile=device.profile,
                online=True,
                last_seen_ms=self.clock.wall,
                assignment_version=assignment.version,
                reported=device.reported,
            )
            if version == NEW:
                behave(self, name)
            else:
                self.report(name, version=version)

    def run(self, rollout: str, behave: Callable[[RolloutRoom, str], None], *, minutes: int = 60) -> RolloutView:
        """Look once a minute until it has ended."""
        for _ in range(minutes):
            self.look()
            self.connect()
            self.deliver(behave)
            self.clock.advance(MINUTE_MS)
            view = asyncio.run(self.desk.get(rollout))
            if view.phase in ENDED:
                break
        return view

    def versions(self) -> list[str]:
        """What each device runs, by its own report."""
        devices = self.releases.fleet.devices
        return [devices[name].reported["models"][0]["version"] for name in sorted(devices)]

    def close(self) -> None:
        """End the database's threads."""
        self.releases.close()


class _Watched:
    """A database whose async writes can be cut."""

    def __init__(self, database: Any, write: Any) -> None:
        self._database = database
        self.write = write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._database, name)


def well(room: RolloutRoom, name: str) -> None:
    """The device commits the release and answers as before."""
    room.report(name, version=NEW)
    room.figures.say(name, NEW, right=195, wrong=5)


def worse(room: RolloutRoom, name: str) -> None:
    """It commits the release and answers worse."""
    room.report(name, version=NEW)
    room.figures.say(name, NEW, right=150, wrong=50)


def refuses(room: RolloutRoom, name: str) -> None:
    """It gives the release up."""
    room.report(name, version=OLD, error_code="model.golden", error="gave other answers")
