"""A device that takes releases while everything else goes on: the real intake and slots, on a ledger and a shelf.

Rules of this file:
1. The ledger is what SQLite promises: a save is on the disk when its call returns, whole or not at all. The power may
   go before and after each save, and between any two effects.
2. Signatures are not checked here (tests/unit/trust does): a document is a number, and the trust rule that is played
   is the one about floors. It is the only thing here that stands for something else.
3. Every effect takes its time and is answered by an event; what a process was about to do dies with it.

Properties:
- `unverified`: a host is started only on files that were verified, and what serves was verified.
- `provisional`: only what passed the golden check in this life commits; only committed releases are gone back to.
- `quarantined`: what is quarantined is not served.
- `floors`: no floor ever goes down, and no accepted assignment is older than one before it.
- `stuck`: when the faults have stopped, the slot comes to rest with the newest release that can serve.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from edge_agent.adapters.ledger import merged_floors
from edge_agent.core import intake, slots
from edge_agent.core.slot_bytes import decode_state, encode_state
from edge_agent.core.slot_values import (
    AnswerBad,
    AnswerGood,
    CancelWork,
    Effect,
    Event,
    Fetch,
    FetchFailed,
    FilesBad,
    FilesHere,
    FilesVerified,
    HostFailed,
    HostReady,
    Note,
    Offered,
    Phase,
    Probe,
    RequestWarmUp,
    Restarted,
    Slot,
    StartHost,
    StartTimer,
    StopHost,
    StopTimer,
    SwitchTo,
    VerifyFiles,
    WarmUpAllowed,
    timer_event,
)
from shared.ids import DeviceId
from shared.machine import Decision
from shared.release import Assignment, Floors, VerifiedAssignment, VerifiedModel
from shared.telemetry import RecordClass
from tests.machines.slot_parts import FAMILY, PROBATION, empty_slot, model
from tests.sim.truth import Violation

if TYPE_CHECKING:
    from tests.sim.machine import Machine
    from tests.sim.process import Process

ASK_MS: Final = 700
"""How often an application asks a model on trial."""
DELIVER_MS: Final = 3_000


@dataclass(frozen=True, slots=True)
class Nature:
    """How a release behaves on this device."""

    is_golden: bool = True
    crashes: bool = False
    answers_badly: bool = False
    is_damaged: bool = False

    @property
    def is_good(self) -> bool:
        """Whether it can come to serve."""
        return self.is_golden and not (self.crashes or self.answers_badly or self.is_damaged)


GOOD: Final = Nature()
BAD: Final = (
    Nature(is_golden=False),
    Nature(crashes=True),
    Nature(answers_badly=True),
    Nature(is_damaged=True),
)


@lru_cache(maxsize=64)
def release(version: int) -> VerifiedModel:
    """The release that the assignment of this version names; every third one raises the floor of releases."""
    return model(f"{version}.0.0", floor=version - 1 if version % 3 == 0 else 0)


@dataclass(slots=True)
class SlotDisk:
    """What survives: the ledger and the shelf, and what the oracle knows of them.

    Attributes:
        highest: the floors as they were ever saved, each at its highest; not the device's.
    """

    state: bytes = field(default_factory=lambda: encode_state(empty_slot()))
    floors: Floors = field(default_factory=Floors)
    highest: Floors = field(default_factory=Floors)
    accepted: int = 0
    here: set[str] = field(default_factory=set)
    verified: set[str] = field(default_factory=set)
    committed: set[str] = field(default_factory=set)


class Releases:
    """What the hub offers all devices over time, and how each release behaves."""

    def __init__(self) -> None:
        self.newest = 0
        self.natures: dict[str, Nature] = {}

    def publish(self, nature: Nature) -> None:
        """A new release, and an assignment that names it."""
        self.newest += 1
        self.natures[release(self.newest).manifest_digest] = nature


class SlotLife:
    """One life of the process, as far as releases go."""

    def __init__(self, process: Process, disk: SlotDisk, releases: Releases) -> None:
        self._process = process
        self._machine: Machine = process.machine
        self._world = process.world
        self._disk = disk
        self._releases = releases
        self._slot = empty_slot()
        self._intake = intake.Intake()
        self._up: set[str] = set()
        self._golden: set[str] = set()
        self._route: str | None = None
        self._works: dict[str, int] = {}
        self._work = 0

    def begin(self) -> None:
        """Go on from what is on the disk."""
        self._check_floors()
        self._slot = decode_state(self._disk.state)
        self.restart()
        if self._disk.accepted:
            self._offer(self._disk.accepted)
        self._process.later(ASK_MS, self._ask)
        self._process.later(self._world.span(DELIVER_MS), self._deliver)

    def restart(self) -> None:
        """Tell the slot that nothing of what it knew is under way."""
        self._handle(Restarted(PROBATION))

    def is_at_rest(self) -> bool:
        """Whether the newest release serves, or cannot and has been given up."""
        newest = self._releases.newest
        if self._intake.phase is not intake.IntakePhase.RESTING or self._disk.accepted != newest:
            return False
        if self._slot.phase not in (Phase.IDLE, Phase.COMMITTED):
            return False
        key = release(newest).manifest_digest if newest else ""
        # A good one may have been given up too, when the power went at each of its loads.
        if newest and self._releases.natures[key].is_good and key not in self._slot.quarantine:
            return self._slot.active is not None and self._slot.active.key == key and key in self._up
        return self._slot.phase is Phase.IDLE or self._route in self._up

    def describe(self) -> str:
        """For a report."""
        return f"slot {self._slot.phase.name}, accepted {self._disk.accepted} of {self._releases.newest}"

    # Assignments

    def _deliver(self) -> None:
        """The hub says what shall run; now and then an old document comes again."""
        newest = self._releases.newest
        if self._process.is_online and newest:
            version = newest if self._world.random.random() < 0.8 else self._world.random.randrange(1, newest + 1)
            self._on_intake(intake.Arrived(b"%d" % version))
        self._process.later(DELIVER_MS, self._deliver)

    def _on_intake(self, event: intake.IntakeEvent) -> None:
        decision = intake.INTAKE.decide(self._intake, event)
        self._intake = decision.state
        for effect in decision.effects:
            match effect:
                case intake.Verify(document):
                    self._process.later(self._world.span(200), self._verify, int(document))
                case intake.OfferModels(verified):
                    self._offer(verified.assignment.version)
                case intake.NoteRefusal():
                    self._machine.put(RecordClass.EVENT, 0)
                case intake.Pause(delay_ms):
                    self._process.later(delay_ms, self._on_intake, intake.PauseOver())

    def _verify(self, version: int) -> None:
        """What the verifier says: refuse what is below a floor, or keep it and raise the floors."""
        if self._world.chance(0.1):
            self._on_intake(intake.Unavailable("no route"))
        elif not self.may_accept(version):
            self._on_intake(intake.Refused("trust.floor", "older than what was accepted"))
        else:
            named = release(version)
            floors = Floors(
                assignment_version=version, releases={FAMILY: named.manifest.min_release_counter}, time_ms=version
            )
            self._machine.disk.elsewhere()
            self.save_verified(version, floors)
            self._machine.disk.elsewhere()
            assignment = Assignment(
                device=DeviceId(self._machine.name), version=version, issued_ms=0, expires_ms=1, models=()
            )
            verified = VerifiedAssignment(assignment=assignment, models=(named,), floors=floors)
            self._on_intake(intake.Accepted(verified))

    def may_accept(self, version: int) -> bool:
        """The rule about floors."""
        return version >= self._disk.floors.assignment_version

    def save_verified(self, version: int, floors: Floors) -> None:
        """Save the accepted assignment and raise the floors, in one transaction."""
        if version < self._disk.accepted:
            raise Violation("floors", f"{self._machine.name} accepts {version} after {self._disk.accepted}")
        self._disk.accepted, self._disk.floors = version, merged_floors(self._disk.floors, floors)
        self._check_floors()
        self._disk.highest = self._disk.floors

    def _check_floors(self) -> None:
        highest, now = self._disk.highest, self._disk.floors
        if merged_floors(highest, now) != now:
            raise Violation("floors", f"{self._machine.name} goes down from {highest} to {now}")

    def _offer(self, version: int) -> None:
        named = release(version)
        self._handle(Offered(model=named, variant="int8", assignment_version=version))

    # The slot

    def _handle(self, event: Event) -> None:
        decision = slots.decide(self._slot, event)
        if decision.state is not self._slot:
            self._check(decision)
            if self._world.trace is not None and decision.state.phase is not self._slot.phase:
                self._world.say(self._machine.name, "slot", decision.state.phase.name)
            self._machine.disk.elsewhere()
            self._disk.state = encode_state(decision.state)
            self._slot = decision.state
            self._machine.disk.elsewhere()
        for effect in decision.effects:
            self._carry_out(effect)
        self._check_serving()

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case Fetch(key, _):
                self._start(f"work {key}", self._world.span(500), self._fetched, key)
            case VerifyFiles(key, _):
                self._start(f"work {key}", self._world.span(100), self._hashed, key)
            case RequestWarmUp(key):
                self._start(f"work {key}", 1, self._handle, WarmUpAllowed(key))
            case StartHost(installed):
                self._start(f"host {installed.key}", 1 + self._world.span(300), self._host_up, installed.key)
            case StopHost(key):
                self._works.pop(f"host {key}", None)
                self._up.discard(key)
                self._golden.discard(key)
            case SwitchTo(key):
                self._route = key
            case Probe(key, count):
                for _ in range(count):
                    self._start(f"probe {key} {self._work}", 1, self._handle, AnswerGood(key))
            case StartTimer(timer, delay_ms):
                self._start(timer.value, delay_ms, self._handle, timer_event(timer))
            case StopTimer(timer):
                self._works.pop(timer.value, None)
            case Note():
                self._machine.put(RecordClass.EVENT, 0)
            case CancelWork(key):
                for name in [name for name in self._works if name.startswith((f"work {key}", f"probe {key}"))]:
                    del self._works[name]

    def _start(self, name: str, delay_ms: int, action: Callable[..., None], *args: Any) -> None:
        self._work += 1
        self._works[name] = self._work
        self._process.later(delay_ms, self._due, name, self._work, action, args)

    def _due(self, name: str, number: int, action: Callable[..., None], args: tuple[Any, ...]) -> None:
        if self._works.get(name) == number:
            del self._works[name]
            action(*args)

    # Files and hosts

    def _fetched(self, key: str) -> None:
        if not self._process.is_online or self._world.chance(0.2):
            self._handle(FetchFailed(key=key, code="transfer.unreachable", message="no route", retry=True))
        else:
            self._disk.here.add(key)
            self._handle(FilesHere(key))

    def _hashed(self, key: str) -> None:
        if key not in self._disk.here or self._releases.natures[key].is_damaged:
            self._disk.here.discard(key)
            self._handle(FilesBad(key=key, code="trust.digest", message="not what was signed"))
        else:
            self._disk.verified.add(key)
            self._handle(FilesVerified(key))

    def _host_up(self, key: str) -> None:
        if key not in self._disk.verified:
            raise Violation("unverified", f"{self._machine.name} starts a host on files that were never verified")
        if not self._releases.natures[key].is_golden:
            self._handle(HostFailed(key=key, code="model.golden", message="wrong labels", retry=False))
            return
        self._up.add(key)
        self._golden.add(key)
        self._handle(HostReady(key))

    def _ask(self) -> None:
        """An application asks whatever serves."""
        key = self._route
        if key is not None and key in self._up:
            nature = self._releases.natures[key]
            if nature.crashes or self._world.chance(0.01):
                self._up.discard(key)
                self._golden.discard(key)
                self._handle(HostFailed(key=key, code="model.host_lost", message="gone", retry=True))
            elif nature.answers_badly and self._slot.phase is Phase.PROBATION:
                self._handle(AnswerBad(key=key, code="model.run", message="cannot"))
            elif slots.counts_answers(self._slot):
                self._handle(AnswerGood(key))
        self._process.later(ASK_MS, self._ask)

    # What must always hold

    def _check(self, decision: Decision[Slot, Effect]) -> None:
        state = decision.state
        if state.phase is Phase.COMMITTED and self._slot.phase is Phase.PROBATION and state.active is not None:
            if state.active.key not in self._golden:
                raise Violation("provisional", f"{self._machine.name} commits what did not pass in this life")
            self._disk.committed.add(state.active.key)
        for kept in (state.active, state.previous):
            if kept is not None and kept.key not in self._disk.committed:
                raise Violation("provisional", f"{self._machine.name} may go back to what never committed")

    def _check_serving(self) -> None:
        if self._route is None or self._route not in self._up:
            return
        if self._route not in self._disk.verified:
            raise Violation("unverified", f"{self._machine.name} serves what was never verified")
        if self._route in self._slot.quarantine:
            raise Violation("quarantined", f"{self._machine.name} serves what is quarantined")
