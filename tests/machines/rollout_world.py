"""A fleet written down by a test, and the rollout machine over it: what the controller does, without any I/O."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from msgspec.structs import replace

from cloud_hub.rollouts import planning, rules
from cloud_hub.rollouts.answers import Answers
from cloud_hub.rollouts.values import Event, Looked, Note, Rollout, Seen, Sighting, Started, WishesDone
from shared.ids import DeviceId
from shared.rollout import ENDED, Phase, Wish, parse_spec
from shared.sketch import sketch_of

OLD, NEW = "1.0.0", "1.1.0"
MANIFEST = {OLD: "0" * 64, NEW: "1" * 64}
MINUTE_MS = 60_000

Behaviour = Callable[["RolloutWorld", DeviceId], None]


@dataclass
class RolloutWorld:
    """Devices, what they answered, a clock, a rollout and every note of it."""

    spec_fields: dict[str, Any] = field(default_factory=dict)
    devices: int = 10
    at_ms: int = 1_800_000_000_000
    fleet: dict[DeviceId, Sighting] = field(default_factory=dict)
    old: dict[DeviceId, Answers] = field(default_factory=dict)
    new: dict[DeviceId, Answers] = field(default_factory=dict)
    assignments: dict[DeviceId, tuple[int, str]] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    watching_since_ms: int = 0

    def __post_init__(self) -> None:
        for number in range(self.devices):
            name = DeviceId(f"dev-{number}")
            self.fleet[name] = Sighting(
                device=name,
                profile="pi4",
                online=True,
                last_seen_ms=self.at_ms,
                phase="committed",
                version=OLD,
                manifest=MANIFEST[OLD],
            )
            self.old[name] = answers(right=195, wrong=5)
        fields = {"soak_s": 600, "deadline_s": 600, "min_answers": 5, "max_harmed": 1, **self.spec_fields}
        spec = parse_spec({"family": "digits", "version": NEW, **fields})
        chosen = planning.choose(self.fleet, spec, manifest=MANIFEST[NEW], taken={})
        self.state = Rollout(id="r", spec=spec, manifest=MANIFEST[NEW], created_ms=self.at_ms, created_by="ann")
        self.say(Started(at_ms=self.at_ms, actor="ann", members=planning.members(chosen, spec)))

    def say(self, event: Event) -> None:
        """Let an event happen."""
        decision = rules.decide(self.state, event)
        self.state = decision.state
        self.notes += decision.effects

    def look(self) -> None:
        """One look of the controller, with assignments carried out."""
        self.say(
            Looked(
                at_ms=self.at_ms,
                watching_since_ms=self.watching_since_ms,
                sightings=dict(self.fleet),
                new=[Seen(name, NEW, a) for name, a in self.new.items()],
                old=[Seen(name, OLD, a) for name, a in self.old.items()],
            )
        )
        self.assign()

    def assign(self) -> None:
        """Make an assignment for every wish."""
        while waiting := rules.outstanding(self.state):
            wish = waiting[0].wish
            assigned = {}
            for member in (one for one in waiting if one.wish is wish):
                version = NEW if wish is Wish.TARGET else str(member.before)
                number = self.assignments.get(member.device, (0, ""))[0] + 1
                self.assignments[member.device] = (number, version)
                assigned[member.device] = number
            self.say(WishesDone(at_ms=self.at_ms, wish=wish, assigned=assigned))

    def deliver(self, behave: Behaviour) -> None:
        """Let every device that is here and has a new assignment act on it."""
        for name, (number, version) in self.assignments.items():
            sighting = self.fleet[name]
            if not sighting.online or sighting.assignment_version >= number:
                continue
            self.change(name, assignment_version=number)
            if version == NEW:
                behave(self, name)
            else:
                self.runs(name, version)

    def run(self, behave: Behaviour, *, minutes: int, until: Callable[[], bool] | None = None) -> None:
        """Look once a minute, for so long or until something holds."""
        for _ in range(minutes):
            if self.state.phase in ENDED:
                return
            self.look()
            self.deliver(behave)
            self.at_ms += MINUTE_MS
            for name, sighting in self.fleet.items():
                if sighting.online:
                    self.change(name, last_seen_ms=self.at_ms)
            if until is not None and until():
                return

    def change(self, name: str, **fields: Any) -> None:
        """Set fields of a sighting."""
        self.fleet[DeviceId(name)] = replace(self.fleet[DeviceId(name)], **fields)

    def runs(self, name: str, version: str, **fields: Any) -> None:
        """The device has committed a version."""
        self.change(name, version=version, manifest=MANIFEST[version], phase="committed", **fields)

    def is_in(self, phase: Phase) -> bool:
        """Whether the rollout stands there."""
        return self.state.phase is phase

    def touched(self) -> list[str]:
        """Devices that were offered the release, in the order of offers."""
        return [member.device for member in self.state.members if member.is_touched]

    def kinds(self) -> list[str]:
        """What was noted."""
        return [note.kind for note in self.notes]


def answers(*, right: int = 0, wrong: int = 0, took_us: int = 2000) -> Answers:
    """Figures with every answer's outcome known."""
    total = right + wrong
    return Answers(answered=total, right=right, wrong=wrong, latency=sketch_of([took_us] * total))


def well(world: RolloutWorld, name: DeviceId) -> None:
    """The device commits the release and answers as well as before."""
    world.runs(name, NEW)
    world.new[name] = answers(right=195, wrong=5)


def worse(world: RolloutWorld, name: DeviceId) -> None:
    """It commits the release and answers worse."""
    world.runs(name, NEW)
    world.new[name] = answers(right=160, wrong=40)


def slower(world: RolloutWorld, name: DeviceId) -> None:
    """It commits the release, which takes twice as long."""
    world.runs(name, NEW)
    world.new[name] = answers(right=195, wrong=5, took_us=4000)


def refuses(world: RolloutWorld, name: DeviceId) -> None:
    """It tries the release and goes back."""
    world.change(name, phase=world.fleet[name].phase or "idle", error_code="model.golden", error="gave other answers")


def dies(world: RolloutWorld, name: DeviceId) -> None:
    """It goes silent over the release."""
    world.change(name, online=False, phase="probation", candidate=NEW)


def idles(world: RolloutWorld, name: DeviceId) -> None:
    """It commits the release and is asked nothing."""
    world.runs(name, NEW)
