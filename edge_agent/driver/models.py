"""The slots at work: saves what the slot machine decided, then fetches, verifies, starts, switches and stops.

Rules of this file:
1. A slot's state is on disk before the first of its effects is carried out.
2. Every effect that takes time runs as a task and answers with an event that carries the release's key, so that an
   answer to work that was given up is recognised by the machine.
3. The routing table (which host answers for which family) is changed by the machine's SwitchTo and by nothing else.
"""

from __future__ import annotations

import asyncio
import logging
import os
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
    FetchFailed,
    FilesBad,
    FilesHere,
    FilesVerified,
    HostFailed,
    HostReady,
    Installed,
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
from edge_agent.driver.events import ForSlot
from edge_agent.driver.loop import Inbox, Timers, Works
from edge_agent.ports import Fetcher, Hosts, Ledger, ModelHost, Shelf
from shared.errors import HostLost, OutriderError, StorageError, TransferCorrupt, TransferError
from shared.ids import FamilyName
from shared.inference import ModelState
from shared.model import FileRef
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
        inbox: Inbox,
        works: Works,
        timers: Timers,
        ledger: Ledger,
        shelf: Shelf,
        fetcher: Fetcher,
        hosts: Hosts,
        note: Callable[[str, dict[str, str]], None],
        report: Callable[[], None],
    ) -> None:
        self._profile = profile
        self._runtimes = runtimes
        self._inbox = inbox
        self._works = works
        self._timers = timers
        self._ledger = ledger
        self._shelf = shelf
        self._fetcher = fetcher
        self._starter = hosts
        self._note = note
        self._report = report
        self._slots: dict[FamilyName, Slot] = {}
        self._hosts: dict[str, ModelHost] = {}
        self._routes: dict[str, Route] = {}
        self._targets: dict[FamilyName, str | None] = {}
        self._warm_up_queue: list[tuple[FamilyName, str]] = []

    # What others ask

    def routes(self) -> dict[str, Route]:
        """Where each family's requests go."""
        return self._routes

    def host(self, key: str) -> ModelHost | None:
        """The host of this release, while it is up."""
        return self._hosts.get(key)

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

    def host_pids(self) -> dict[str, int]:
        """Process ids of the model hosts by release key."""
        return {key: host.pid for key, host in self._hosts.items()}

    # What happens

    async def restore(self) -> None:
        """Read every slot from disk and let each say how it goes on."""
        for family, data in (await self._ledger.load_slots()).items():
            self._slots[FamilyName(family)] = decode_state(data)
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
                logger.warning("release does not fit this device", extra={"family": family, "why": chosen.reason})
                detail = {"family": family, "version": model.manifest.version, "message": chosen.reason}
                self._note("release.misfit", detail)
                continue
            offered = Offered(
                model=model,
                variant=chosen.name,
                assignment_version=verified.assignment.version,
                force=family in verified.assignment.force,
            )
            await self.handle(family, offered)
        for family in set(self._slots) - named:
            await self.handle(family, Withdrawn())

    async def handle(self, family: FamilyName, event: Event) -> None:
        """Let the slot decide, save its state, carry out its effects."""
        before = self._slots.get(family) or slots.new_slot(family, probation=self._profile.probation)
        decision = slots.decide(before, event)
        if decision.state is not before:
            await self._ledger.save_slot(family, encode_state(decision.state))
        self._slots[family] = decision.state
        self._route(family)
        if decision.state.phase is not before.phase:
            logger.info("slot moved", extra={"family": family, "phase": decision.state.phase.value})
        for effect in decision.effects:
            self._carry_out(family, effect)
        self._admit_warm_up()

    async def stop(self) -> None:
        """End every host."""
        hosts, self._hosts = list(self._hosts.values()), {}
        self._routes.clear()
        for host in hosts:
            await host.stop()

    # Effects

    def _carry_out(self, family: FamilyName, effect: Effect) -> None:
        match effect:
            case Fetch(key, files):
                self._works.start(("fetch", family), self._fetch(family, key, files))
            case VerifyFiles(key, files):
                self._works.start(("verify", family), self._verify(family, key, files))
            case RequestWarmUp(key):
                self._warm_up_queue.append((family, key))
            case CancelWork(key):
                self._cancel(family, key)
            case StartHost(release):
                self._start_host(family, release)
            case StopHost(key):
                self._stop_host(family, key)
            case SwitchTo(key):
                self._switch(family, key)
            case Probe(key, count):
                self._works.start(("probe", key), self._probe(family, key, count))
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

    async def _fetch(self, family: FamilyName, key: str, files: tuple[FileRef, ...]) -> None:
        try:
            for file in files:
                if not self._shelf.has(file.digest):
                    await self._fetcher.blob(file, self._shelf)
        except (TransferError, StorageError) as error:
            failed = FetchFailed(key=key, code=error.code, message=error.message, retry=error.retry)
            self._inbox.post(ForSlot(family, failed))
        else:
            self._inbox.post(ForSlot(family, FilesHere(key)))

    async def _verify(self, family: FamilyName, key: str, files: tuple[FileRef, ...]) -> None:
        try:
            await asyncio.to_thread(_check_files, self._shelf, files)
        except (TransferCorrupt, StorageError) as error:
            self._inbox.post(ForSlot(family, FilesBad(key=key, code=error.code, message=error.message)))
        else:
            self._inbox.post(ForSlot(family, FilesVerified(key)))

    def _cancel(self, family: FamilyName, key: str) -> None:
        self._works.cancel(("fetch", family))
        self._works.cancel(("verify", family))
        self._works.cancel(("probe", key))
        self._warm_up_queue = [entry for entry in self._warm_up_queue if entry != (family, key)]

    def _admit_warm_up(self) -> None:
        if self._warm_up_queue and all(slot.phase is not Phase.WARMUP for slot in self._slots.values()):
            family, key = self._warm_up_queue.pop(0)
            self._inbox.post(ForSlot(family, WarmUpAllowed(key)))

    def _start_host(self, family: FamilyName, release: Installed) -> None:
        if release.key in self._hosts:
            self._inbox.post(ForSlot(family, HostReady(release.key)))
        elif not self._works.running(("host", release.key)):
            self._works.start(("host", release.key), self._bring_up(family, release))

    async def _bring_up(self, family: FamilyName, release: Installed) -> None:
        key = release.key
        model_fd = golden_fd = -1
        try:
            model_fd = await asyncio.to_thread(self._shelf.open, release.served.file)
            golden_fd = await asyncio.to_thread(self._shelf.open, release.manifest.golden.file)
            fds, model_fd, golden_fd = (model_fd, golden_fd), -1, -1
            host, ready = await self._starter.start(
                manifest=release.manifest,
                variant=release.served,
                model_fd=fds[0],
                golden_fd=fds[1],
                on_lost=lambda reason: self._lost(family, key, reason),
            )
        except (TransferCorrupt, StorageError) as error:
            self._inbox.post(ForSlot(family, FilesBad(key=key, code=error.code, message=error.message)))
            return
        except OutriderError as error:
            failed = HostFailed(key=key, code=error.code, message=error.message, retry=error.retry)
            self._inbox.post(ForSlot(family, failed))
            return
        finally:
            for descriptor in (model_fd, golden_fd):
                if descriptor >= 0:
                    os.close(descriptor)
        logger.info(
            "model host ready",
            extra={"family": family, "version": release.manifest.version, "load_ms": ready.load_ms},
        )
        self._hosts[key] = host
        self._route(family)
        self._inbox.post(ForSlot(family, HostReady(key)))

    def _lost(self, family: FamilyName, key: str, reason: str) -> None:
        self._hosts.pop(key, None)
        self._route(family)
        logger.warning("model host lost", extra={"family": family, "reason": reason})
        self._inbox.post(ForSlot(family, HostFailed(key=key, code="model.host_lost", message=reason, retry=True)))

    def _stop_host(self, family: FamilyName, key: str) -> None:
        self._works.cancel(("host", key))
        host = self._hosts.pop(key, None)
        if host is not None:
            self._route(family)
            self._works.start(("stop", key, host.pid), host.stop())

    def _switch(self, family: FamilyName, key: str | None) -> None:
        self._targets[family] = key
        self._route(family)

    def _route(self, family: FamilyName) -> None:
        """Recompute one route; cheap for requests to read, so it is kept rather than derived for each of them."""
        slot, key = self._slots[family], self._targets.get(family)
        release = next((r for r in (slot.candidate, slot.active) if r is not None and r.key == key), None)
        self._routes[family] = Route(release=release, up=key in self._hosts)

    def _answering(self, slot: Slot) -> str | None:
        key = self._targets.get(slot.family)
        return key if key in self._hosts else None

    async def _probe(self, family: FamilyName, key: str, count: int) -> None:
        for _ in range(count):
            host = self._hosts.get(key)
            if host is None:
                return
            try:
                good = await host.probe()
            except HostLost:
                return  # told by on_lost
            except OutriderError as error:
                self.answer_bad(family, key, error)
                continue
            if good:
                self.answer_good(family, key)
            else:
                self.answer_bad(family, key, OutriderError("a golden sample got another answer", code="model.golden"))

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


def _check_files(shelf: Shelf, files: tuple[FileRef, ...]) -> None:
    for file in files:
        os.close(shelf.open(file))
