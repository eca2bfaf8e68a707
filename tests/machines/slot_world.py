"""A device in a drawer: a disk, a driver and the world around one slot, where the power can go at every boundary.

The driver here does what the real one must: save, then carry out the effects in order, then feed the answers back.
`Boundary` is every moment between two of these steps; `Plan.cuts` says at which of them the power goes. After a cut
everything but the disk is gone, and the next life starts with `Restarted`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from edge_agent.core import slots
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
    Timer,
    VerifyFiles,
    WarmUpAllowed,
    timer_event,
)
from shared.machine import Decision
from tests.machines.slot_parts import PROBATION, empty_slot

MAX_STEPS = 400


class PowerCut(Exception):
    """The power is gone."""


@dataclass(frozen=True)
class Nature:
    """How a release behaves: `golden` fails the check, `crashes` after that many answers, `damaged` on the shelf."""

    golden: bool = True
    crashes: bool = False
    wrong: bool = False
    damaged: bool = False
    loses_host: int = 0


@dataclass(frozen=True)
class Story:
    """A script: offers in order (each once the slot rests, or after the named phase), natures, failing fetches."""

    offers: tuple[Offered, ...]
    natures: dict[str, Nature] = field(default_factory=dict)
    fetch_failures: int = 0
    refuse_fetch: frozenset[str] = frozenset()
    interrupt_in: Phase | None = None


@dataclass
class Disk:
    """What survives."""

    state: bytes
    verified: set[str] = field(default_factory=set)
    damaged: set[str] = field(default_factory=set)
    offered: int = 0
    fetch_failures: int = 0
    committed: set[str] = field(default_factory=set)
    lost_hosts: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class World:
    """One device over all its lives."""

    def __init__(self, story: Story, *, cuts: frozenset[int]) -> None:
        self.story = story
        self.cuts = cuts
        self.boundary = 0
        self.lives = 0
        self.steps = 0
        self.disk = Disk(state=encode_state(empty_slot()), fetch_failures=story.fetch_failures)
        self.slot = empty_slot()
        self._boot()

    # One life

    def _boot(self) -> None:
        self.lives += 1
        self.slot = decode_state(self.disk.state)
        self.up: set[str] = set()
        self.golden_passed: set[str] = set()
        self.route: str | None = None
        self.timers: set[Timer] = set()
        self.inbox: deque[Event] = deque([Restarted(PROBATION), *self.story.offers[: self.disk.offered][-1:]])

    def run(self) -> Slot:
        """Live until nothing is left to happen; returns the slot at rest."""
        while True:
            try:
                self._live()
                return self.slot
            except PowerCut:
                self._boot()

    def _live(self) -> None:
        while True:
            while self.inbox:
                self._handle(self.inbox.popleft())
            if not self._something_happens():
                return

    def _something_happens(self) -> bool:
        """What the world does when nothing is in the inbox: answers, then timers, then the next offer."""
        phase, serving = self.slot.phase, slots.serving(self.slot)
        interrupts = self.story.interrupt_in is phase and self.disk.offered < len(self.story.offers)
        if interrupts or (phase in (Phase.IDLE, Phase.COMMITTED) and not self.timers):
            return self._next_offer()
        if phase is Phase.PROBATION and serving is not None and serving.key in self.up and self._answer(serving.key):
            return True
        if self.timers:
            timer = min(self.timers, key=lambda timer: timer.value)
            self.timers.discard(timer)
            self.inbox.append(timer_event(timer))
            return True
        raise AssertionError(f"stuck in {phase} with nothing to wait for")

    def _next_offer(self) -> bool:
        if self.disk.offered >= len(self.story.offers):
            return False
        self.inbox.append(self.story.offers[self.disk.offered])
        self.disk.offered += 1
        return True

    def _answer(self, key: str) -> bool:
        """An application asks; True when the answer is news to the slot."""
        nature = self._nature(key)
        if nature.crashes:
            self._lose(key)
        elif nature.wrong:
            self.inbox.append(AnswerBad(key=key, code="model.run", message="cannot"))
        elif self.disk.lost_hosts.get(key, 0) < nature.loses_host:
            self.disk.lost_hosts[key] = self.disk.lost_hosts.get(key, 0) + 1
            self._lose(key)
        elif slots.counts_answers(self.slot):
            self.inbox.append(AnswerGood(key))
        else:
            return False
        return True

    def _lose(self, key: str) -> None:
        self.up.discard(key)
        self.golden_passed.discard(key)
        self.inbox.append(HostFailed(key=key, code="model.host_lost", message="gone", retry=True))

    # The driver

    def _handle(self, event: Event) -> None:
        self.steps += 1
        assert self.steps < MAX_STEPS, f"goes in circles: {self.slot.phase}, {self.disk.notes[-8:]}"
        decision = slots.decide(self.slot, event)
        self._cross()
        if decision.state is not self.slot:
            self._check(decision)
            self.disk.state = encode_state(decision.state)
            self.slot = decision.state
        for effect in decision.effects:
            self._cross()
            self._carry_out(effect)
            self._check_serving()

    def _cross(self) -> None:
        self.boundary += 1
        if self.boundary in self.cuts:
            raise PowerCut

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case Fetch(key, _):
                self._fetch(key)
            case VerifyFiles(key, _):
                if self._nature(key).damaged:
                    self.inbox.append(FilesBad(key=key, code="trust.digest", message="not what was signed"))
                else:
                    self.disk.verified.add(key)
                    self.inbox.append(FilesVerified(key))
            case RequestWarmUp(key):
                self.inbox.append(WarmUpAllowed(key))
            case StartHost(release):
                self._start_host(release.key)
            case StopHost(key):
                self.up.discard(key)
                self.golden_passed.discard(key)
            case SwitchTo(key):
                self.route = key
            case Probe(key, count):
                self.inbox.extend([AnswerGood(key)] * count)
            case StartTimer(timer, _):
                self.timers.add(timer)
            case StopTimer(timer):
                self.timers.discard(timer)
            case Note(name, _):
                self.disk.notes.append(name)
            case CancelWork(key):
                self.inbox = deque(event for event in self.inbox if getattr(event, "key", None) != key)

    def _fetch(self, key: str) -> None:
        if key in self.story.refuse_fetch:
            self.inbox.append(FetchFailed(key=key, code="transfer.refused", message="404", retry=False))
        elif self.disk.fetch_failures:
            self.disk.fetch_failures -= 1
            self.inbox.append(FetchFailed(key=key, code="transfer.unreachable", message="no route", retry=True))
        else:
            self.inbox.append(FilesHere(key))

    def _start_host(self, key: str) -> None:
        assert key in self.disk.verified, "a host is started only on files that were verified"
        if self._nature(key).golden:
            self.up.add(key)
            self.golden_passed.add(key)
            self.inbox.append(HostReady(key))
        else:
            self.inbox.append(HostFailed(key=key, code="model.golden", message="wrong labels", retry=False))

    def _nature(self, key: str) -> Nature:
        return self.story.natures.get(key, Nature())

    # What must always hold

    def _check(self, decision: Decision[Slot, Effect]) -> None:
        state = decision.state
        if state.phase is Phase.COMMITTED and self.slot.phase is Phase.PROBATION:
            assert state.active is not None
            assert state.active.key in self.golden_passed, "commits only what passed the golden check in this life"
            self.disk.committed.add(state.active.key)
        for release in (state.active, state.previous):
            if release is not None:
                assert release.key in self.disk.committed, "nothing provisional is ever gone back to"
                assert release.manifest_digest not in state.quarantine
        assert (state.candidate is None) == (state.phase in (Phase.IDLE, Phase.COMMITTED))
        assert (state.active is not None) or state.phase is not Phase.COMMITTED

    def _check_serving(self) -> None:
        if self.route is not None and self.route in self.up:
            assert self.route in self.disk.verified, "what serves was verified"
            assert self.route not in self.slot.quarantine, "what is quarantined never serves"
