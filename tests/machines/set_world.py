"""A device in a drawer, with several models: ledger, shelf and trust on one disk, and the power goes at any boundary.

The driver here does what the real one must: decide on all that happened at once, save it in one write, then carry out
the effects in order. A boundary is every moment before and after a write to the disk, and before each effect; `cuts`
says at which of them the power goes. What a shelf holds is bytes, and a host is started on bytes that were hashed.

Properties, looked at after every decision:
- no request is ever answered by a mixture: what serves fits one assignment, for the families that change together;
- what is committed fits one assignment too, and nothing that was committed is lost without another in its place;
- what serves was hashed, passed the golden check in this life, and is not quarantined; floors never go down.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from edge_agent.adapters.ledger import merged_floors
from edge_agent.core import offering, sets, slots
from edge_agent.core.slot_bytes import decode_state, encode_state
from edge_agent.core.slot_values import (
    AnswerBad,
    AnswerGood,
    CancelWork,
    CollectGarbage,
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
    Timer,
    VerifyFiles,
    WarmUpAllowed,
    timer_event,
)
from shared.ids import DeviceId, Digest, FamilyName, ModelVersion
from shared.limits import MIB
from shared.model import FileRef, Golden, Manifest, Variant, encode_manifest, target_path
from shared.profile import MemoryBudget
from shared.release import AssignedModel, Assignment, Floors, VerifiedAssignment, VerifiedModel
from tests.machines.slot_parts import PROBATION, model

MAX_STEPS = 1_500
HOST_MIB = 20
ROOMY = MemoryBudget(host_bytes=64 * MIB, total_bytes=1024 * MIB)


class PowerCut(Exception):
    """The power is gone."""


@dataclass(frozen=True)
class Nature:
    """How a release behaves on this device.

    Attributes:
        loses_host: so often it is lost on trial before it answers.
        takes_power: in this phase of its slot the power goes, every time.
    """

    golden: bool = True
    crashes: bool = False
    wrong: bool = False
    damaged: bool = False
    missing: bool = False
    loses_host: int = 0
    takes_power: Phase | None = None


@dataclass(frozen=True)
class Assigned:
    """An assignment: a version for each family, and the sets."""

    models: dict[str, str]
    together: tuple[tuple[str, ...], ...] = ()
    force: tuple[str, ...] = ()


@dataclass(frozen=True)
class Story:
    """Assignments in order, each once the device rests, or as soon as some slot is in `interrupt_in`."""

    assigned: tuple[Assigned, ...]
    natures: dict[tuple[str, str], Nature] = field(default_factory=dict)
    interrupt_in: Phase | None = None
    memory: MemoryBudget = ROOMY
    backwards: bool = False


def content(path: str) -> bytes:
    """What the hub has at this path."""
    return path.encode() * 3


def _file(family: str, version: str, name: str) -> FileRef:
    path = target_path(FamilyName(family), ModelVersion(version), name)
    data = content(path)
    return FileRef(path=path, length=len(data), digest=Digest(hashlib.sha256(data).hexdigest()))


_RELEASES: dict[tuple[str, str], VerifiedModel] = {}


def release(family: str, version: str) -> VerifiedModel:
    """A release of this family."""
    if (family, version) not in _RELEASES:
        manifest: Manifest = replace(
            model(version).manifest,
            family=FamilyName(family),
            golden=Golden(file=_file(family, version, "golden.bin"), samples=2, min_agreement=1.0),
            variants=(
                Variant(
                    name="int8",
                    runtime="onnx",
                    file=_file(family, version, "int8.onnx"),
                    accuracy=1.0,
                    answers=(0, 1),
                    ram_bytes=HOST_MIB * MIB,
                ),
            ),
        )
        digest = Digest(hashlib.sha256(encode_manifest(manifest)).hexdigest())
        _RELEASES[family, version] = VerifiedModel(manifest=manifest, manifest_digest=digest)
    return _RELEASES[family, version]


def key(family: str, version: str) -> Digest:
    """The key of a release."""
    return release(family, version).manifest_digest


def verified(assigned: Assigned, *, version: int) -> VerifiedAssignment:
    """What the verifier makes of an assignment."""
    models = tuple(release(family, named) for family, named in sorted(assigned.models.items()))
    return VerifiedAssignment(
        assignment=Assignment(
            device=DeviceId("dev"),
            version=version,
            issued_ms=0,
            expires_ms=1,
            models=tuple(
                AssignedModel(
                    family=one.manifest.family,
                    version=one.manifest.version,
                    manifest=FileRef(path="m", length=1, digest=one.manifest_digest),
                )
                for one in models
            ),
            force=tuple(map(FamilyName, assigned.force)),
            together=tuple(tuple(map(FamilyName, families)) for families in assigned.together),
        ),
        models=models,
        floors=Floors(assignment_version=version, time_ms=version),
    )


@dataclass
class Disk:
    """What survives: slot rows, the accepted assignment with the floors, finished and unfinished files; and the world.

    `accepted` counts the assignments that were verified; `committed` and `lost_hosts` are the test's own memory.
    """

    rows: dict[FamilyName, bytes] = field(default_factory=dict)
    accepted: int = 0
    floors: Floors = field(default_factory=Floors)
    files: dict[str, bytes] = field(default_factory=dict)
    partial: dict[str, bytes] = field(default_factory=dict)
    writes: list[str] = field(default_factory=list)
    committed: set[FamilyName] = field(default_factory=set)
    lost_hosts: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class SetWorld:
    """One device over all its lives."""

    def __init__(self, story: Story, *, cuts: frozenset[int] = frozenset()) -> None:
        self.story = story
        self.cuts = cuts
        self.boundary = 0
        self.lives = 0
        self.steps = 0
        self.disk = Disk()
        self.names = {key(*named): named for named in self._releases()}
        self._boot()

    def _releases(self) -> list[tuple[str, str]]:
        return sorted({named for assigned in self.story.assigned for named in assigned.models.items()})

    # One life

    def _boot(self) -> None:
        self.lives += 1
        self.slots: dict[FamilyName, Slot] = {family: decode_state(row) for family, row in self.disk.rows.items()}
        self.up: set[str] = set()
        self.routes: dict[FamilyName, str | None] = {}
        self.timers: set[tuple[FamilyName, Timer]] = set()
        self.room: deque[tuple[FamilyName, str]] = deque()
        self.inbox: deque[list[sets.ForFamily]] = deque()

    def run(self) -> dict[str, str]:
        """Live until nothing is left to happen; returns the version that serves of each family."""
        while True:
            try:
                self._live()
                return self.serving()
            except PowerCut:
                self._boot()

    def _live(self) -> None:
        self._handle([(family, Restarted(PROBATION)) for family in self.slots])
        if self.disk.accepted:
            self._offer(self.disk.accepted)
        for family in self.disk.committed & set(self._wanted()):
            assert self.slots[family].active is not None, f"{family}: what was committed is gone after a restart"
        while True:
            while self.inbox:
                self._handle(self.inbox.popleft())
                self._admit()
            if not self._something_happens():
                return

    def _wanted(self) -> Sequence[FamilyName]:
        named = self.story.assigned[max(self.disk.accepted, 1) - 1].models
        return [FamilyName(family) for family in named]

    def _families(self) -> list[FamilyName]:
        return sorted(self.slots, reverse=self.story.backwards)

    def _something_happens(self) -> bool:
        """What the world does when nothing is in the inbox: answers, timers, the next assignment, and long waits."""
        if any(slot.phase is self.story.interrupt_in for slot in self.slots.values()) and self._accept_next():
            return True
        for family in self._families():
            if self.slots[family].phase is Phase.PROBATION and self._answer(family):
                return True
        for family in self._families():
            for timer in sorted((t for f, t in self.timers if f == family), key=lambda t: t.value):
                if timer is not Timer.WAIT:
                    return self._fire(family, timer)
        if all(slot.phase in (Phase.IDLE, Phase.COMMITTED) for slot in self.slots.values()) and self._accept_next():
            return True
        return any(self._fire(family, timer) for family, timer in sorted(self.timers, key=lambda one: one[0])[:1])

    def _fire(self, family: FamilyName, timer: Timer) -> bool:
        self.timers.discard((family, timer))
        self.inbox.append([(family, timer_event(timer))])
        return True

    def _accept_next(self) -> bool:
        """The verifier accepts the next assignment: it and the floors are saved in one write, then it is offered."""
        if self.disk.accepted >= len(self.story.assigned):
            return False
        version = self.disk.accepted + 1
        floors = merged_floors(self.disk.floors, verified(self.story.assigned[version - 1], version=version).floors)
        self._cross()
        assert merged_floors(self.disk.floors, floors) == floors, "floors never go down"
        self.disk.accepted, self.disk.floors = version, floors
        self.disk.writes.append("trust")
        self._cross()
        self._offer(version)
        return True

    def _offer(self, version: int) -> None:
        assigned = verified(self.story.assigned[version - 1], version=version)
        chosen = {one.manifest.family: one.manifest.variants[0] for one in assigned.models}
        self._handle(offering.offers(assigned, chosen, self.slots, self.story.memory))
        self._admit()

    def _answer(self, family: FamilyName) -> bool:
        """An application asks; True when the answer is news to the slot."""
        name = self.routes.get(family)
        if name is None or name not in self.up:
            return False
        nature = self._nature(name)
        if nature.takes_power is Phase.PROBATION:
            raise PowerCut
        if nature.crashes or self.disk.lost_hosts.get(name, 0) < nature.loses_host:
            self.disk.lost_hosts[name] = self.disk.lost_hosts.get(name, 0) + 1
            self.up.discard(name)
            self._say(family, HostFailed(key=name, code="model.host_lost", message="gone", retry=True))
        elif nature.wrong:
            self._say(family, AnswerBad(key=name, code="model.run", message="cannot"))
        elif slots.counts_answers(self.slots[family]):
            self._say(family, AnswerGood(name))
        else:
            return False
        return True

    def _say(self, family: FamilyName, event: Event) -> None:
        self.inbox.append([(family, event)])

    # The driver

    def _handle(self, events: Sequence[sets.ForFamily]) -> None:
        self.steps += 1
        assert self.steps < MAX_STEPS, f"goes in circles: {self.describe()}"
        before = dict(self.slots)
        for family, _ in events:
            before.setdefault(family, slots.new_slot(family, probation=PROBATION))
        change = sets.decide(before, events)
        if change.slots:
            self._cross()
            self.disk.rows |= {family: encode_state(slot) for family, slot in change.slots.items()}
            self.disk.writes.append("ledger")
            self._remember(before, change.slots)
            self.slots = before | change.slots
            self._check_disk()
        for family, effect in change.effects:
            self._cross()
            self._carry_out(family, effect)
        self._check_serving()

    def _cross(self) -> None:
        self.boundary += 1
        if self.boundary in self.cuts:
            raise PowerCut

    def _admit(self) -> None:
        # An allowance counts from when it was given, not from when its slot hears of it.
        given = any(isinstance(event, WarmUpAllowed) for events in self.inbox for _, event in events)
        if self.room and not given and all(slot.phase is not Phase.WARMUP for slot in self.slots.values()):
            admitted = [entry for entry in self.room if sets.may_warm_up(self.slots, entry[0])]
            entry = (admitted or list(self.room))[0]
            self.room.remove(entry)
            self._say(entry[0], WarmUpAllowed(entry[1]))

    def _carry_out(self, family: FamilyName, effect: Effect) -> None:
        match effect:
            case Fetch(name, files):
                self._fetch(family, name, files)
            case VerifyFiles(name, files):
                good = not self._nature(name).damaged and all(self._is_whole(file) for file in files)
                bad = FilesBad(key=name, code="trust.digest", message="not what was signed")
                self._say(family, FilesVerified(name) if good else bad)
            case RequestWarmUp(name):
                self.room.append((family, name))
            case StartHost(installed):
                self._start_host(family, installed.key, installed.files)
            case StopHost(name):
                self.up.discard(name)
            case SwitchTo(name):
                self.routes[family] = name
            case Probe(name, count):
                for _ in range(count):
                    self._say(family, AnswerGood(name))
            case StartTimer(timer, _):
                self.timers.add((family, timer))
            case StopTimer(timer):
                self.timers.discard((family, timer))
            case Note(name, _):
                self.disk.notes.append(f"{family} {name}")
            case CancelWork(name):
                self.room = deque(entry for entry in self.room if entry != (family, name))
                self.inbox = deque(
                    events for events in self.inbox if not any(getattr(one, "key", None) == name for _, one in events)
                )
            case CollectGarbage():
                keep = slots.files_to_keep(self.slots.values())
                self.disk.files = {digest: data for digest, data in self.disk.files.items() if digest in keep}
                self.disk.partial = {digest: data for digest, data in self.disk.partial.items() if digest in keep}

    def _fetch(self, family: FamilyName, name: str, files: Sequence[FileRef]) -> None:
        """Two pieces and a rename for each file; what is there already is not fetched, what is half there goes on."""
        if self._nature(name).missing:
            self._say(family, FetchFailed(key=name, code="transfer.refused", message="404", retry=False))
            return
        for file in files:
            data, half = content(file.path), file.length // 2
            while file.digest not in self.disk.files:
                have = self.disk.partial.get(file.digest, b"")
                self._cross()
                if len(have) == len(data):
                    self.disk.files[file.digest] = self.disk.partial.pop(file.digest)
                else:
                    self.disk.partial[file.digest] = data[: half if not have else len(data)]
                self.disk.writes.append("shelf")
                self._cross()
        self._say(family, FilesHere(name))

    def _is_whole(self, file: FileRef) -> bool:
        data = self.disk.files.get(file.digest)
        return data is not None and hashlib.sha256(data).hexdigest() == file.digest

    def _start_host(self, family: FamilyName, name: str, files: Sequence[FileRef]) -> None:
        nature = self._nature(name)
        if name in self.up:
            self._say(family, HostReady(name))
        elif not all(self._is_whole(file) for file in files):
            self._say(family, FilesBad(key=name, code="transfer.corrupt", message="the disk has changed it"))
        elif nature.takes_power is Phase.WARMUP:
            raise PowerCut
        elif nature.golden:
            self.up.add(name)
            self._say(family, HostReady(name))
        else:
            self._say(family, HostFailed(key=name, code="model.golden", message="wrong labels", retry=False))

    def _nature(self, name: str) -> Nature:
        return self.story.natures.get(self.names[Digest(name)], Nature())

    # What must always hold

    def serving(self) -> dict[str, str]:
        """The version that answers, of each family of which one does."""
        return {family: self.names[Digest(name)][1] for family, name in self.routes.items() if name in self.up if name}

    def committed(self) -> dict[str, str]:
        """The version that is committed on the disk, of each family."""
        return {family: slot.active.manifest.version for family, slot in self.slots.items() if slot.active is not None}

    def quarantined(self) -> set[tuple[str, str]]:
        """Every release that this device will not run again."""
        return {self.names[digest] for slot in self.slots.values() for digest in slot.quarantine}

    def describe(self) -> str:
        """For a failure."""
        phases = {family: slot.phase.value for family, slot in self.slots.items()}
        return f"{phases}, serving {self.serving()}, committed {self.committed()}, {self.disk.notes[-6:]}"

    def _remember(self, before: sets.States, after: sets.States) -> None:
        for family, slot in after.items():
            if slot.phase is Phase.COMMITTED and before[family].phase is Phase.PROBATION and slot.active is not None:
                assert slot.active.key in self.up, "commits only what passed the golden check in this life"
                self.disk.committed.add(family)

    def _sets(self) -> list[tuple[str, ...]]:
        return sorted({families for assigned in self.story.assigned for families in assigned.together})

    def _fits(self, versions: dict[str, str], families: tuple[str, ...]) -> bool:
        """Whether these versions of a set's families, as far as given, are those of one assignment."""
        given = {family: versions[family] for family in families if family in versions}
        return any(given.items() <= assigned.models.items() for assigned in self.story.assigned) or not given

    def _check_disk(self) -> None:
        for families in self._sets():
            committed = self.committed()
            assert self._fits(committed, families), f"a mixture was committed: {self.describe()}"
        for slot in self.slots.values():
            for installed in (slot.active, slot.previous):
                assert installed is None or installed.manifest_digest not in slot.quarantine
            assert (slot.candidate is None) == (slot.phase in (Phase.IDLE, Phase.COMMITTED))

    def _check_serving(self) -> None:
        for families in self._sets():
            assert self._fits(self.serving(), families), f"a mixture serves: {self.describe()}"
        for family, name in self.routes.items():
            if name is not None and name in self.up:
                assert name not in self.slots[family].quarantine, "what is quarantined never serves"
