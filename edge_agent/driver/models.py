"""The slots at work: saves what the slot machine decided, then has it fetched, verified, started, switched, stopped.

Rules of this file:
1. A slot's state is on disk before the first of its effects is carried out.
2. Every effect that takes time runs as a task and answers with an event that carries the release's key, so that an
   answer to work that was given up is recognised by the machine.
3. The routing table (which host answers for which family) is changed by the machine's SwitchTo and by nothing else.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable

from edge_agent.core import health, slots
from edge_agent.core.serving import Route
from edge_agent.core.slot_values import (
    AnswerBad,
    AnswerGood,
    CancelWork,
    CollectGarbage,
    Effect,
    Event,
    Fetch,
    Note,
    Offered,
    Phase,
    Probe,
    Report,
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
    Withdrawn,
    decode_state,
    encode_state,
    timer_event,
)
from edge_agent.core.variants import Misfit, choose
from edge_agent.driver.bringing import Supplies
from edge_agent.driver.events import ForSlot
from edge_agent.driver.files import Files
from edge_agent.driver.hosting import Hosting
from edge_agent.driver.loop import Loop
from edge_agent.ports import Hosts, Ledger
from edge_agent.update_ports import Shelf
from shared.errors import OutriderError, StorageError
from shared.ids import Digest, FamilyName
from shared.inference import ModelState
from shared.profile import DeviceProfile
from shared.release import Patch, VerifiedAssignment, VerifiedModel
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
            make_room=self._collect,
        )
        self._files = Files(loop=loop, bringing=bringing, note=note)
        self.hosting = Hosting(loop=loop, shelf=shelf, hosts=hosts, on_change=self._route)
        self._note = note
        self._report = report
        self._slots: dict[FamilyName, Slot] = {}
        self._routes: dict[str, Route] = {}
        self._targets: dict[FamilyName, str | None] = {}
        self._warm_up_queue: list[tuple[FamilyName, str]] = []
        self._warm_up_allowed: tuple[FamilyName, str] | None = None
        self._misfits: dict[FamilyName, str] = {}

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

    def running(self) -> tuple[RunningModel, ...]:
        """Every slot as the hub is told of it."""
        return tuple(health.running_model(slot, self._answering(slot)) for _, slot in sorted(self._slots.items()))

    def states(self) -> tuple[ModelState, ...]:
        """Every slot as the door describes it."""
        return tuple(health.model_state(slot, self._answering(slot)) for _, slot in sorted(self._slots.items()))

    # What happens

    async def restore(self) -> None:
        """Read every slot from disk and let each say how it goes on."""
        for family, data in (await self._ledger.load_slots()).items():
            self._slots[FamilyName(family)] = decode_state(data)
        # A power cut may have come between an end and its collection.
        with contextlib.suppress(StorageError):
            self._collect()
        for family in list(self._slots):
            self._inbox.post(ForSlot(family, Restarted(self._profile.probation)))

    async def offer(self, verified: VerifiedAssignment) -> None:
        """Offer each model of an accepted assignment to its slot, and withdraw the families that it leaves out."""
        named = set()
        for model in verified.models:
            family = model.manifest.family
            named.add(family)
            chosen = choose(model.manifest, profile=self._profile, runtimes=self._runtimes)
            if isinstance(chosen, Misfit):
                self._note_misfit(model, chosen)
                continue
            offered = Offered(
                model=model,
                variant=chosen.name,
                assignment_version=verified.assignment.version,
                force=family in verified.assignment.force,
                patches=_patches_to(verified, chosen.file.digest, model.manifest.golden.file.digest),
            )
            await self.handle(family, offered)
        for family in set(self._slots) - named:
            await self.handle(family, Withdrawn())

    def _note_misfit(self, model: VerifiedModel, misfit: Misfit) -> None:
        """Say it once for each release, although its assignment is offered again and again."""
        family = model.manifest.family
        if self._misfits.get(family) == model.manifest_digest:
            return
        self._misfits[family] = model.manifest_digest
        logger.warning("release does not fit this device", extra={"family": family, "why": misfit.reason})
        detail = {"family": family, "version": model.manifest.version, "message": misfit.reason}
        self._note("release.misfit", detail)

    async def handle(self, family: FamilyName, event: Event) -> None:
        """Let the slot decide, save its state, carry out its effects."""
        before = self._slots.get(family) or slots.new_slot(family, probation=self._profile.probation)
        decision = slots.decide(before, event)
        if decision.state is not before:
            await self._ledger.save_slot(family, encode_state(decision.state))
        if isinstance(event, WarmUpAllowed):
            self._warm_up_allowed = None
        self._slots[family] = decision.state
        self._route(family)
        if decision.state.phase is not before.phase:
            logger.info("slot moved", extra={"family": family, "phase": decision.state.phase.value})
        for effect in decision.effects:
            self._carry_out(family, effect)
        self._admit_warm_up()

    async def stop(self) -> None:
        """End every host."""
        self._routes.clear()
        await self.hosting.stop_all()

    # Effects

    def _carry_out(self, family: FamilyName, effect: Effect) -> None:
        match effect:
            case Fetch():
                self._files.fetch(family, effect)
            case VerifyFiles(key, files):
                self._files.verify(family, key, files)
            case RequestWarmUp(key):
                self._warm_up_queue.append((family, key))
            case CancelWork(key):
                self._cancel(family, key)
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
                self._collect()

    def _cancel(self, family: FamilyName, key: str) -> None:
        self._files.cancel(family)
        self.hosting.cancel_probes(key)
        self._warm_up_queue = [entry for entry in self._warm_up_queue if entry != (family, key)]

    def _admit_warm_up(self) -> None:
        if self._warm_up_allowed is not None or not self._warm_up_queue:
            return  # an allowance counts from when it was given, not from when its slot hears of it
        if all(slot.phase is not Phase.WARMUP for slot in self._slots.values()):
            family, key = self._warm_up_allowed = self._warm_up_queue.pop(0)
            self._inbox.post(ForSlot(family, WarmUpAllowed(key)))

    def _route(self, family: FamilyName) -> None:
        """Recompute one route; cheap for requests to read, so it is kept rather than derived for each of them."""
        slot, key = self._slots[family], self._targets.get(family)
        release = next((r for r in (slot.candidate, slot.active) if r is not None and r.key == key), None)
        self._routes[family] = Route(release=release, up=self.hosting.get(key) is not None)

    def _answering(self, slot: Slot) -> str | None:
        key = self._targets.get(slot.family)
        return key if self.hosting.get(key) is not None else None

    def answer_good(self, family: FamilyName, key: str) -> None:
        """A host answered. Posted only where it counts: in a settled slot it would be work for nothing."""
        if slots.counts_answers(self._slots[family]):
            self._inbox.post(ForSlot(family, AnswerGood(key)))

    def answer_bad(self, family: FamilyName, key: str, error: OutriderError) -> None:
        """A model failed on an acceptable input."""
        self._inbox.post(ForSlot(family, AnswerBad(key=key, code=error.code, message=error.message)))

    def _collect(self) -> None:
        # Not in a thread: between reading what is kept and removing the rest no slot may begin to fetch.
        freed = self._shelf.collect(slots.files_to_keep(self._slots.values()))
        if freed:
            logger.info("old model files removed", extra={"freed_bytes": freed})


def _patches_to(verified: VerifiedAssignment, *results: Digest) -> tuple[Patch, ...]:
    return tuple(patch for patch in verified.assignment.patches if patch.result in results)
