"""The composition root of the daemon: makes every part, starts them, and ends them in order.

The only module that knows all the others. One process, one event loop, one task group.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Final

from edge_agent import runtimes
from edge_agent.adapters.children import sweep_orphans
from edge_agent.adapters.cloud import HubCloud
from edge_agent.adapters.comparer import LiveComparer
from edge_agent.adapters.database import Database
from edge_agent.adapters.door import Door
from edge_agent.adapters.hosts import HostOptions, LiveHosts
from edge_agent.adapters.ledger import SqliteLedger
from edge_agent.adapters.lock import AgentLock
from edge_agent.adapters.old_records import SqliteOldRecords
from edge_agent.adapters.outbox import JournalOutbox
from edge_agent.adapters.patcher import LivePatcher
from edge_agent.adapters.samples import SqliteReplies, SqliteSamples
from edge_agent.adapters.shelf import FileShelf
from edge_agent.adapters.system import SystemClock, SystemMoments
from edge_agent.adapters.trainers import LiveTrainers, TrainerOptions
from edge_agent.adapters.vitals import Vitals
from edge_agent.connections import connect
from edge_agent.core.journal import bounds_for
from edge_agent.driver.agent import Agent
from edge_agent.driver.answering import Answering
from edge_agent.driver.bringing import Supplies
from edge_agent.driver.escalation import Escalation
from edge_agent.driver.events import Noted, Stop
from edge_agent.driver.loop import Inbox, Loop
from edge_agent.driver.metering import Meter
from edge_agent.driver.models import Models
from edge_agent.driver.records import Records
from edge_agent.driver.rounds import Rounds, TrainingRoom
from edge_agent.driver.service import Service
from edge_agent.driver.uplink import RunningDevice, Uplink
from edge_agent.identity import IDENTITY_DIR, TRUST_DIR, Identity, load_file, load_identity, sweep
from edge_agent.keeping import translated
from edge_agent.settings import AgentConfig, Launch
from edge_agent.update_ports import Fetcher
from shared.profile import DeviceProfile

logger = logging.getLogger(__name__)

STOP_WITHIN_S: Final = 10.0
MIN_FREE_SHARE: Final = 20
"""The outbox leaves at most this part of its file system free: a twentieth."""


async def run(launch: Launch) -> int:
    """Run the daemon until SIGTERM (returns 0) or SIGINT (returns 130).

    Raises:
        ConfigError: not enrolled, or a door that cannot be opened.
        Conflict: another agent uses the state directory.
        StorageError: the state directory cannot be used.
    """
    config, profile = launch.config, launch.profile
    with AgentLock(config.state_dir):
        identity = load_identity(config.state_dir)
        with translated(config.state_dir / IDENTITY_DIR):
            sweep(config.state_dir / IDENTITY_DIR, generation=load_file(config.state_dir).generation)
        sweep_orphans(hosts_dir(config))
        clock = SystemClock()
        has_forgotten = not config.database_path.exists() and _has_accepted(config.state_dir / TRUST_DIR)
        database = await Database.open(config.database_path, clock=clock)
        try:
            if has_forgotten:
                await SqliteLedger(database).lose_floors()
            outbox = await _outbox(config, profile, clock)
            try:
                async with asyncio.TaskGroup() as group:
                    agent, door, loop = await _compose(config, identity, profile, clock, database, outbox, group)
                    try:
                        reason = await _live(agent, door, loop.inbox, identity, profile)
                    finally:
                        loop.end()
            finally:
                await outbox.close()
        finally:
            await database.close()
    return 130 if reason == "SIGINT" else 0


async def _compose(
    config: AgentConfig,
    identity: Identity,
    profile: DeviceProfile,
    clock: SystemClock,
    database: Database,
    outbox: JournalOutbox,
    group: asyncio.TaskGroup,
) -> tuple[Agent, Door, Loop]:
    loop = Loop(group)
    ledger = SqliteLedger(database)
    records = Records(clock=clock, loop=loop, outbox=outbox)
    loop.works.start("old-records", records.adopt(SqliteOldRecords(database)))
    running = RunningDevice(device=identity.device, profile=profile.name, boot=await ledger.next_boot())
    hub = connect(config, identity, profile=profile.name, clock=clock, loop=loop, ledger=ledger, uplink=lambda: uplink)
    supplies = _supplies(config, hub.fetcher, ledger=ledger)
    report = partial(_report, lambda: uplink)
    models = _models(config, profile, clock=clock, loop=loop, ledger=ledger, supplies=supplies, report=report)
    uplink: Uplink = Uplink(
        running=running,
        clock=clock,
        loop=loop,
        courier=hub.courier,
        outbox=outbox,
        models=models.running,
    )
    answering = _answering(config, hub.cloud, clock=clock, loop=loop, models=models, uplink=uplink, records=records)
    room = _training_room(config, profile, database, supplies.fetcher)
    routes, send = models.routes, partial(uplink.send, "round")
    rounds = Rounds(device=identity.device, clock=clock, loop=loop, room=room, routes=routes, send=send)
    service = Service(
        running=running,
        clock=clock,
        loop=loop,
        models=models,
        uplink=uplink,
        records=records,
        answering=answering,
        rounds=rounds,
        timekeeping=hub.timekeeping,
        renewals=hub.renewals,
        meter=supplies.meter,
    )
    agent = Agent(
        loop=loop,
        ledger=ledger,
        verifier=hub.verifier,
        models=models,
        uplink=uplink,
        records=records,
        answering=answering,
        rounds=rounds,
        timekeeping=hub.timekeeping,
        renewals=hub.renewals,
        vitals=Vitals(state_dir=config.state_dir),
        heartbeat_ms=config.intervals.heartbeat_ms,
        vitals_ms=config.intervals.vitals_ms,
    )
    door = Door(path=config.door_path, handle=service.handle, tasks=group, http=config.door.http_address)
    return agent, door, loop


def _report(uplink: Callable[[], Uplink]) -> None:
    uplink().report_soon()


def _supplies(config: AgentConfig, fetcher: Fetcher, *, ledger: SqliteLedger) -> Supplies:
    updates = config.updates
    meter = Meter(ledger=ledger, moments=SystemMoments(), daily_bytes=updates.daily_bytes)
    shelf = FileShelf(config.state_dir)
    return Supplies(
        fetcher=fetcher,
        meter=meter,
        patcher=LivePatcher(shelf=shelf),
        comparer=LiveComparer(shelf=shelf),
        policy=updates.policy,
    )


def _models(
    config: AgentConfig,
    profile: DeviceProfile,
    *,
    clock: SystemClock,
    loop: Loop,
    ledger: SqliteLedger,
    supplies: Supplies,
    report: Callable[[], None],
) -> Models:
    options = HostOptions(threads=profile.inference.threads, memory_bytes=profile.memory.host_bytes)
    return Models(
        profile=profile,
        runtimes=runtimes.installed(),
        loop=loop,
        ledger=ledger,
        shelf=FileShelf(config.state_dir),
        supplies=supplies,
        hosts=LiveHosts(directory=hosts_dir(config), clock=clock, options=options),
        note=lambda name, detail: loop.inbox.post(Noted(name, detail)),
        report=report,
    )


def _answering(
    config: AgentConfig,
    cloud: HubCloud,
    *,
    clock: SystemClock,
    loop: Loop,
    models: Models,
    uplink: Uplink,
    records: Records,
) -> Answering:
    escalation = Escalation(cloud=cloud, policy=config.cascade, clock=clock, loop=loop, uplink=uplink, records=records)
    return Answering(
        clock=clock,
        models=models,
        records=records,
        escalation=escalation,
        cache_entries=config.cache.entries,
        cache_bytes=config.cache.bytes,
    )


def _training_room(config: AgentConfig, profile: DeviceProfile, database: Database, fetcher: Fetcher) -> TrainingRoom:
    return TrainingRoom(
        samples=SqliteSamples(database),
        replies=SqliteReplies(database),
        trainers=LiveTrainers(
            directory=hosts_dir(config), options=TrainerOptions(memory_bytes=profile.memory.host_bytes)
        ),
        shelf=FileShelf(config.state_dir),
        tasks=FileShelf(config.state_dir / "rounds"),
        fetcher=fetcher,
        enabled=config.training.enabled,
    )


async def _outbox(config: AgentConfig, profile: DeviceProfile, clock: SystemClock) -> JournalOutbox:
    queue = config.queue
    system = os.statvfs(config.state_dir)
    # On a small file system the same reserve would leave nothing to the queue.
    min_free_bytes = min(queue.min_free_bytes, system.f_blocks * system.f_frsize // MIN_FREE_SHARE)
    bounds = bounds_for(profile.disk.queue_bytes, min_free_bytes=min_free_bytes, ttl_ms=queue.ttl_ms)
    return await JournalOutbox.open(
        config.outbox_dir, bounds=bounds, clock=clock, moments=SystemMoments(), flush_ms=queue.flush_ms
    )


def _has_accepted(trust_dir: Path) -> bool:
    """Whether metadata was accepted here before: beside the root, which comes with the enrolment, there is more."""
    return trust_dir.is_dir() and any(path.name != "root.json" for path in trust_dir.iterdir())


def hosts_dir(config: AgentConfig) -> Path:
    """Where model hosts are on file while they run; made if it is missing."""
    folder = config.state_dir / "hosts"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


async def _live(agent: Agent, door: Door, inbox: Inbox, identity: Identity, profile: DeviceProfile) -> str:
    async with _signals(inbox):
        await door.open()
        try:
            await agent.start()
            logger.info("agent started", extra={"device": identity.device, "profile": profile.name})
            reason = await agent.run()
            logger.info("agent stops", extra={"reason": reason})
        finally:
            await door.close()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_WITHIN_S):
                    await agent.stop()
    return reason


@contextlib.asynccontextmanager
async def _signals(inbox: Inbox) -> AsyncIterator[None]:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, inbox.post, Stop(number.name))
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
