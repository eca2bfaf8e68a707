"""The slots at work: saves what the slot machine decided, then has it fetched, verified, started, switched, stopped.

Rules of this file:
1. What was decided is on disk, for all slots that it changes in one transaction, before the first effect is carried
   out; effects of one decision are carried out without a pause, so that nobody is answered by half a set.
2. Every effect that takes time runs as a task and answers with an event that carries the release's key, so that an
   answer to work that was given up is recognised by the machine.
3. The routing table (which host answers for which family) is changed by the machine's SwitchTo and by nothing else.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence

from edge_agent.core import health, sets, slots
from edge_agent.core.offering import offers
from edge_agent.core.serving import Route
from edge_agent.core.slot_bytes import decode_state, encode_state
from edge_agent.core.slot_values import (
    AnswerBad,
    AnswerGood,
    CancelWork,
    CollectGarbage,
    Effect,
    Event,
    Fetch,
    Installed,
    Note,
    Probe,
    Report,
    RequestWarmUp,
    RestartDue,
    Restarted,
    Slot,
    StartHost,
    StartTimer,
    StopHost,
    Stopping,
    StopTimer,
    SwitchTo,
    VerifyFiles,
    WarmUpAllowed,
    timer_event,
)
from edge_agent.core.variants import Misfit, choose
from edge_agent.driver.bringing import Supplies
from edge_agent.driver.events import ForSlot, ForSlots
from edge_agent.driver.files import Files
from edge_agent.driver.hosting import Hosting
from edge_agent.driver.loop import Loop
from edge_agent.driver.misfits import Misfits
from edge_agent.driver.warmups import WarmUps
from edge_agent.driver.withheld import Withheld
from edge_agent.ports import Hosts, Ledger
from edge_agent.update_ports import Shelf
from shared.errors import OutriderError, StorageError
from shared.ids import Digest, FamilyName
from shared.inference import ModelState
from shared.profile import DeviceProfile
from shared.release import VerifiedAssignment
from shared.wire.messages import RunningModel

logger = logging.getLogger(__name__)


class Models:
    """All slots of the device, their hosts, and who answers for which family."""

    def __init__(
        self,
        *,
        profile: DeviceProfile,
        runtimes: frozenset[str],
        loop: Loop,
        ledger: Ledger,
        shelf: Shelf,
        supplies: Supplies,
        hosts: Hosts,
        note: Callable[[str, dict[str, str]], None],
        report: Callable[[], None],
    ) -> None:
        self._profile = profile
        self._runtimes = runtimes
        self._inbox, self._works, self._timers = loop.inbox, loop.works, loop.timers
        self._ledger = ledger
        self._shelf = shelf
        bringing = supplies.bringing(
            shelf=shelf,
            models_bytes=profile.disk.models_bytes,
            kept=lambda: slots.kept_files(self._slots.values()),
            make_room=lambda: _collect(self._shelf, self._slots),
        )
        self._files = Files(loop=loop, bringing=bringing, note=note)
        self.hosting = Hosting(loop=loop, shelf=shelf, hosts=hosts, on_change=self._route)
        self._note = note
        self._report = report
        self._slots: dict[FamilyName, Slot] = {}
        self._routes: dict[str, Route] = {}
        self._targets: dict[FamilyName, str | None] = {}
        self._warm_ups = WarmUps(allow=lambda family, key: self._inbox.post(ForSlot(family, WarmUpAllowed(key))))
        self._misfits = Misfits(note)
        self.withheld = Withheld(self._route, self._slots.keys())

    # What others ask

    def routes(self) -> dict[str, Route]:
        """Where each family's requests go."""
        return self._routes

    def families(self) -> tuple[FamilyName, ...]:
        """Every family that the device has a slot for."""
        return tuple(self._slots)

    def slot(self, family: str) -> Slot | None:
        """The slot of this family, if the device has one."""
        return self._slots.get(FamilyName(family))

    def can_roll_back(self, family: FamilyName) -> bool:
        """Whether going back by hand would change anything; of a set that changed as one, whether all of it can."""
        going = [self._slots[other] for other in (family, *self._slots[family].changed_with) if other in self._slots]
        held = any(slot.previous is not None and slot.previous.key in self.withheld for slot in going)
        return sets.can_roll_back(self._slots, family) and not held

    def running(self) -> tuple[RunningModel, ...]:
        """Every slot as the hub is told of it."""
        return tuple(health.running_model(slot, self._answering(slot)) for _, slot in sorted(self._slots.items()))

    def states(self) -> tuple[ModelState, ...]:
        """Every slot as the door describes it."""
        return tuple(health.model_state(slot, self._answering(slot)) for _, slot in sorted(self._slots.items()))

    def installed(self) -> tuple[Installed, ...]:
        """Every release that a slot holds, in whatever state."""
        held = ((slot.active, slot.previous, slot.candidate) for slot in self._slots.values())
        return tuple(release for releases in held for release in releases if release is not None)

    # What happens

    async def restore(self) -> None:
        """Read every slot from disk and let each say how it goes on."""
        whole = True
        for family, data in (await self._ledger.load_slots()).items():
            try:
                self._slots[FamilyName(family)] = decode_state(data)
            except StorageError as error:
                if error.code != "storage.slot":
                    raise  # of a newer agent, which shall find it as it left it
                # Damaged: the accepted assignment is offered to an empty slot, through every check.
                logger.error("slot cannot be read, begins empty", extra={"family": family, "why": error.message})
                whole = False
                self._note("slot.unreadable", {"family": family, "message": error.message})
        if whole and self._slots:
            # A power cut may have come between an end and its collection. Where a slot was lost nothing is removed:
            # what it ran may be offered to it again.
            with contextlib.suppress(StorageError):
                _collect(self._shelf, self._slots)
        if self._slots:
            restarted = Restarted(self._profile.probation)
            self._inbox.post(ForSlots(tuple((family, restarted) for family in self._slots)))

    async def offer(self, verified: VerifiedAssignment) -> None:
        """Offer each model of an accepted assignment to its slot, and withdraw the families that it leaves out."""
        chosen = {
            model.manifest.family: choose(model.manifest, profile=self._profile, runtimes=self._runtimes)
            for model in verified.models
        }
        for model in verified.models:
            misfit = chosen[model.manifest.family]
            if isinstance(misfit, Misfit):
                self._misfits.say(model, misfit)
        await self.handle_all(offers(verified, chosen, self._slots, self._profile.memory))

    async def distrust(self, reasons: Mapping[Digest, tuple[str, str]]) -> None:
        """Withhold these releases, without quarantine; what was before each serves again, if it still holds.

        Args:
            reasons: a code and words for each, by the digest of its manifest. To be said of all that do not hold at
                once: then none of them is gone back to.
        """
        events, withheld = sets.distrusted(self._slots, reasons)
        self.withheld.hold(withheld)
        await self.handle_all(events)

    async def trust(self, verified: VerifiedAssignment) -> None:
        """Serve again what was withheld and is named by this assignment, which was accepted."""
        freed = self.withheld.trust(verified)
        back = [family for family, slot in self._slots.items() if slot.active is not None and slot.active.key in freed]
        await self.handle_all([(family, RestartDue()) for family in back])

    async def handle(self, family: FamilyName, event: Event) -> None:
        """Decide what this event comes to, save it, carry it out."""
        await self.handle_all([(family, event)])

    async def handle_all(self, events: Sequence[tuple[FamilyName, Event]]) -> None:
        """Decide what these events, which happened at once, come to; save it in one transaction; carry it out."""
        before = dict(self._slots)
        for family, _ in events:
            if family not in before:
                before[family] = slots.new_slot(family, probation=self._profile.probation)
        change = sets.decide(before, events)
        if change.slots:
            await self._ledger.save_slots({family: encode_state(slot) for family, slot in change.slots.items()})
        if any(isinstance(event, WarmUpAllowed) for _, event in events):
            self._warm_ups.heard()
        self._slots = before | change.slots
        for family, slot in change.slots.items():
            if slot.phase is not before[family].phase:
                logger.info("slot moved", extra={"family": family, "phase": slot.phase.value})
            if slot.error_code and slot.error_code != before[family].error_code:
                logger.warning(
                    "a release did not come in", extra={"family": family, "code": slot.error_code, "why": slot.error}
                )
        for family, effect in change.effects:
            self._carry_out(family, effect)
        for family in {*change.slots, *(family for family, _ in events)}:
            self._route(family)
        self._warm_ups.admit(self._slots)

    async def stop(self) -> None:
        """End every host; that it ends in order is not held against what is on trial."""
        try:
            await self.handle_all([(family, Stopping()) for family in self._slots])
        except StorageError as error:
            logger.warning("an orderly end could not be saved", extra={"why": error.message})
        self._routes.clear()
        await self.hosting.stop_all()

    # Effects

    def _carry_out(self, family: FamilyName, effect: Effect) -> None:
        match effect:
            case Fetch():
                self._files.fetch(family, effect)
            case VerifyFiles():
                self._files.verify(family, effect)
            case RequestWarmUp(key):
                self._warm_ups.ask(family, key)
            case CancelWork(key):
                self._files.cancel(family)
                self.hosting.cancel_probes(key)
                self._warm_ups.cancel(family, key)
            case StartHost(release):
                self.hosting.start(family, release)
            case StopHost(key):
                self.hosting.stop(family, key)
            case SwitchTo(key):
                self._targets[family] = key
                self._route(family)
            case Probe(key, count):
                self.hosting.probe(family, key, count)
            case StartTimer(timer, delay_ms):
                self._timers.start((family, timer), delay_ms, ForSlot(family, timer_event(timer)))
            case StopTimer(timer):
                self._timers.stop((family, timer))
            case Report():
                self._report()
            case Note(name, detail):
                self._note(name, {"family": family, **detail})
            case CollectGarbage():
                _collect(self._shelf, self._slots)

    def _route(self, family: FamilyName) -> None:
        """Recompute one route; cheap for requests to read, so it is kept rather than derived for each of them."""
        slot, key = self._slots[family], self._targets.get(family)
        release = next((r for r in (slot.candidate, slot.active) if r is not None and r.key == key), None)
        if release is not None and release.key in self.withheld:
            release = None
        self._routes[family] = Route(release=release, up=self.hosting.get(key) is not None)

    def _answering(self, slot: Slot) -> str | None:
        key = self._targets.get(slot.family)
        return key if self.hosting.get(key) is not None and key not in self.withheld else None

    def answer_good(self, family: FamilyName, key: str) -> None:
        """A host answered. Posted only where it counts: in a settled slot it would be work for nothing."""
        if slots.counts_answers(self._slots[family]):
            self._inbox.post(ForSlot(family, AnswerGood(key)))

    def answer_bad(self, family: FamilyName, key: str, error: OutriderError) -> None:
        """A model failed on an acceptable input."""
        self._inbox.post(ForSlot(family, AnswerBad(key=key, code=error.code, message=error.message)))


def _collect(shelf: Shelf, states: sets.States) -> None:
    # Not in a thread: between reading what is kept and removing the rest no slot may begin to fetch.
    freed = shelf.collect(slots.files_to_keep(states.values()))
    if freed:
        logger.info("old model files removed", extra={"freed_bytes": freed})
