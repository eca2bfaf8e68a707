"""The composition root of `outrider-hub serve`: checks what it stands on, has the rooms built, owns every task.

Order of start: database, certificates, ports; then the broker, the link to it, the rooms' own loops and HTTPS. The hub
is ready when devices and operators can both reach it. Order of end: whoever takes work first, the broker last.

Not here: what is built from what (composition/).
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Final

import uvloop

import shared
from cloud_hub.composition.foundation import Foundation
from cloud_hub.composition.house import compose
from cloud_hub.composition.signing import online_keys
from cloud_hub.config import HubConfig
from cloud_hub.devices.desk import write_lists
from cloud_hub.ground import broker as managed_broker
from cloud_hub.ground import migrate, rotation, tlsport, transport, walltime
from cloud_hub.ground.access import BrokerAccess
from cloud_hub.ground.authorities import Authorities
from cloud_hub.ground.broker import Broker, BrokerSettings
from cloud_hub.ground.bus import Bus
from cloud_hub.ground.courier import HubCourier, Inbound, Link, LinkSettings
from cloud_hub.ground.database import Database
from cloud_hub.ground.metrics import Metrics
from cloud_hub.ground.readiness import notify
from cloud_hub.ground.revocation import AccessLists
from cloud_hub.ground.switchboard import Switchboard
from cloud_hub.ground.system import SystemClock, raise_file_limit, take_turns_sooner
from cloud_hub.ground.tlsport import HttpsServer
from cloud_hub.releases.desk import newest_root
from shared.clock import Clock
from shared.errors import ConfigError, OutriderError, StorageError, Unreachable

logger = logging.getLogger(__name__)

LINK_S: Final = 20.0
RENEW_LOOK_S: Final = 3600.0
CLAIM_LOOK_S: Final = 10.0
CA_LOOK_S: Final = 2.0


def run(config: HubConfig, *, announce: Callable[[str], None], manager: str | None) -> int:
    """Serve until a signal; returns 0 after SIGTERM and 130 after SIGINT.

    Args:
        config: checked.
        announce: told one line when the hub is ready.
        manager: the service manager's socket, None without one.

    Raises:
        OutriderError: it could not start, or could not go on.
    """
    require_own_packages()
    config.require()
    raise_file_limit()
    take_turns_sooner()
    clock = SystemClock()
    with config.folder.alone(), closing(Database(config.database_url)) as database:
        migrate.require_current(database)
        database.claim()
        metrics = Metrics()
        time = walltime.begin(database, clock, metrics=metrics)
        authorities = load_authorities(config, clock=clock, require_time=time.require)
        renew_certificates(config, authorities, clock=clock)
        keys = online_keys(config.folder.keys)
        keys(newest_root(database))
        lists = AccessLists(config.folder.broker, authorities=authorities, hub_name=config.broker.hub_name, clock=clock)
        # Before the broker starts: a list that has ended while the hub was down would keep the whole fleet out.
        write_lists(database, lists, clock=clock)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            foundation = Foundation(
                config=config,
                clock=clock,
                database=database,
                authorities=authorities,
                metrics=metrics,
                bus=Bus(),
                link=Link(clock),
                keys=keys,
                lists=lists,
                time=time,
            )
            try:
                return runner.run(_serve(foundation, announce=announce, manager=manager))
            except BaseExceptionGroup as group:
                raise _first(group) from group


def require_own_packages() -> None:
    """Refuse to run with a `shared` that is not the one beside us: the name is easily shadowed."""
    ours = Path(__file__).resolve().parent.parent / "shared"
    found = Path(str(shared.__file__)).resolve().parent
    if found != ours:
        raise ConfigError(
            f"`shared` was imported from {found}, not from {ours}",
            code="config.shadowed",
            hint="start it from another directory, or with PYTHONSAFEPATH=1",
        )


def load_authorities(
    config: HubConfig, *, clock: Clock, require_time: Callable[[int], None] = lambda _: None
) -> Authorities:
    """The CA, or both during a change; `require_time` as for `Authorities`. Raises ConfigError."""
    pair = rotation.load(config.folder, now_ms=clock.wall_ms())
    authorities = Authorities(pair.issuing, require_time=require_time)
    authorities.adopt(pair)
    return authorities


def renew_certificates(config: HubConfig, authorities: Authorities, *, clock: Clock) -> tuple[str, ...]:
    """Issue the certificates of our ports anew where names changed or they end soon; returns what was issued."""
    now_ms = clock.wall_ms()
    if authorities.expires_ms <= now_ms:
        raise ConfigError(
            "the hub's CA has expired", code="config.ca_expired", hint="check the machine's clock; else make a new hub"
        )
    issued = transport.ensure(
        config.folder,
        authorities.now.issuing,
        other=authorities.now.other,
        names=config.server_names,
        broker_names=config.broker_names,
        hub_name=config.broker.hub_name,
        now_ms=now_ms,
        days=config.certificates.server_days,
    )
    if issued:
        logger.info("certificates issued: %s", ", ".join(issued))
    return issued


async def _renew_in_time(foundation: Foundation, *, turn: asyncio.Lock, reload: Callable[[], None]) -> None:
    """Renew certificates while the hub runs, long before they end: a hub that is never restarted must not go dark.

    Listeners load the new ones for new connections; the hub's own link to the broker does so when it next connects.
    """
    while True:
        await asyncio.sleep(RENEW_LOOK_S)
        try:
            renew = partial(renew_certificates, foundation.config, foundation.authorities, clock=foundation.clock)
            async with turn:
                if await asyncio.to_thread(renew):
                    reload()
        except OutriderError as error:
            logger.error("certificates cannot be renewed: %s", error.message)


async def _follow_authorities(
    foundation: Foundation,
    *,
    turn: asyncio.Lock,
    list_all: Callable[[], Awaitable[bool]],
    reload: Callable[[], None],
    forget: Callable[[], None],
) -> None:
    """Notice a step of `outrider-hub ca rotate` and go on with what it left, without a restart of the hub.

    Args:
        foundation: the hub's.
        turn: held while files of certificates are made.
        list_all: writes a revocation list of each CA that is trusted now and has the broker read it; whether it could.
        reload: makes listeners read their files again.
        forget: makes the broker drop a CA that is trusted no longer.
    """
    config, authorities = foundation.config, foundation.authorities
    # From when they were read: what has changed while the hub started is followed as well.
    seen, before = authorities.now.stamp, set(authorities.fingerprints)
    while True:
        await asyncio.sleep(CA_LOOK_S)
        if rotation.stamp(config.folder) == seen:
            continue
        try:
            pair = await asyncio.to_thread(rotation.load, config.folder, now_ms=foundation.clock.wall_ms())
            async with turn:
                authorities.adopt(pair)
                # First: a broker that trusts a CA of which it has no list keeps all devices of that CA out.
                if not await list_all():
                    continue
                await asyncio.to_thread(renew_certificates, config, authorities, clock=foundation.clock)
            reload()
        except OutriderError as error:
            # Half a step is on disk, or the disk refuses: what was trusted goes on, and this is looked at again.
            logger.error("the change of the CA cannot be followed: %s", error.message)
            continue
        logger.info("CA %s, phase %s", authorities.fingerprint, pair.phase)
        if before - set(authorities.fingerprints):
            forget()
        seen, before = pair.stamp, set(authorities.fingerprints)


async def _keep_claim(foundation: Foundation) -> None:
    """Hold the database while the hub runs: a server that was restarted has forgotten who does.

    Raises:
        Conflict: another hub has it meanwhile, and two would undo each other's work.
    """
    while True:
        await asyncio.sleep(CLAIM_LOOK_S)
        try:
            await asyncio.to_thread(foundation.database.claim)
        except StorageError as error:
            logger.debug("the claim on the database cannot be renewed now: %s", error.message)


async def _serve(foundation: Foundation, *, announce: Callable[[str], None], manager: str | None) -> int:
    config, metrics = foundation.config, foundation.metrics
    stop: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    _watch_signals(stop)
    listener = tlsport.bind(config.listen.host, config.listen.port, key="listen.port")
    with closing(listener):
        settings = _broker_settings(config)
        if settings is not None:
            managed_broker.find_binary(settings.binary)
            await managed_broker.require_free_port(settings)
        async with asyncio.TaskGroup() as broker_group:
            broker_task: asyncio.Task[None] | None = None
            if settings is not None:
                broker_up = asyncio.Event()
                broker = Broker(settings, metrics=metrics, clock=foundation.clock)
                broker_task = broker_group.create_task(broker.run(ready=broker_up))
                await broker_up.wait()
            try:
                # An external broker's certificates are its owner's affair.
                reload = broker.reload if settings is not None else lambda: None
                restart = broker.restart if settings is not None else lambda: None
                return await _serve_rooms(
                    foundation,
                    listener=listener,
                    stop=stop,
                    announce=announce,
                    manager=manager,
                    reload_broker=reload,
                    restart_broker=restart,
                )
            finally:
                notify(manager, "STOPPING=1")
                if broker_task is not None:
                    broker_task.cancel()


async def _serve_rooms(
    foundation: Foundation,
    *,
    listener: socket.socket,
    stop: asyncio.Future[int],
    announce: Callable[[str], None],
    manager: str | None,
    reload_broker: Callable[[], None],
    restart_broker: Callable[[], None],
) -> int:
    config = foundation.config
    # The courier needs someone to hand messages to, the rooms need someone to send with: a short way round.
    inbox: list[Switchboard] = []

    def deliver(messages: Sequence[Inbound]) -> None:
        inbox[0].put(messages)

    courier = HubCourier(_link_settings(config), on_messages=deliver, metrics=foundation.metrics, link=foundation.link)
    access = BrokerAccess(
        foundation.lists,
        authorities=foundation.authorities,
        link=_link_settings(config),
        reload=reload_broker,
        clock=foundation.clock,
    )
    house = compose(foundation, publish=courier.publish, parts=lambda: {"broker": courier.is_connected}, access=access)
    inbox.append(house.switchboard)
    house.releases.open()
    await house.devices.start()
    https_up, link_up = asyncio.Event(), asyncio.Event()
    server = HttpsServer(
        house.app,
        certificate=config.folder.server_certificate,
        key=config.folder.server_key,
        ca=config.folder.broker / "ca.pem",
        ready=https_up,
    )

    def reload() -> None:
        server.reload_certificate()
        reload_broker()

    turn, list_all = asyncio.Lock(), house.devices.standings.enforce
    follow = partial(_follow_authorities, foundation, turn=turn, list_all=list_all, reload=reload)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_forever(loop)) for loop in house.loops]
        tasks += [
            group.create_task(house.switchboard.run()),
            group.create_task(courier.run(ready=link_up)),
            group.create_task(server.run_on(listener)),
            group.create_task(_renew_in_time(foundation, turn=turn, reload=reload)),
            group.create_task(follow(forget=restart_broker)),
            group.create_task(_keep_claim(foundation)),
        ]
        tasks.append(group.create_task(_announce(config, (https_up, link_up), announce=announce, manager=manager)))
        status = await stop
        logger.info("stopping")
        for task in tasks:
            task.cancel()
    return status


async def _announce(
    config: HubConfig, events: tuple[asyncio.Event, ...], *, announce: Callable[[str], None], manager: str | None
) -> None:
    # A managed broker has answered already, so a link that does not come is a fault of ours. An external one may be
    # down for long: HTTPS serves meanwhile, and `/readyz` says what is missing.
    deadline_s = LINK_S if config.broker.mode == "managed" else None
    try:
        async with asyncio.timeout(deadline_s):
            for event in events:
                await event.wait()
    except TimeoutError as error:
        raise Unreachable(
            "the hub cannot reach its own broker",
            code="transfer.broker",
            hint=f"see {config.folder.broker / 'mosquitto.log'}",
        ) from error
    announce(f"hub ready: {config.hub_url} mqtts://{config.broker_host}:{config.broker.port}")
    notify(manager, "READY=1")


async def _forever(loop: Callable[[], Awaitable[None]]) -> None:
    await loop()


def _watch_signals(stop: asyncio.Future[int]) -> None:
    def ask(status: int) -> None:
        if not stop.done():
            stop.set_result(status)

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, ask, 0)
    loop.add_signal_handler(signal.SIGINT, ask, 130)


def _broker_settings(config: HubConfig) -> BrokerSettings | None:
    if config.broker.mode == "external":
        return None
    return BrokerSettings(
        folder=config.folder.broker,
        host=config.broker.host,
        port=config.broker.port,
        binary=config.broker.binary,
        hub_name=config.broker.hub_name,
    )


def _link_settings(config: HubConfig) -> LinkSettings:
    folder = config.folder.broker
    managed = config.broker.mode == "managed"
    return LinkSettings(
        host=managed_broker.local_address(config.broker.host) if managed else config.broker.host,
        port=config.broker.port,
        name=config.broker.hub_name,
        ca=folder / "ca.pem",
        certificate=folder / "hub.pem",
        key=folder / "hub.key",
    )


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first real error of a group of groups: what the person is told."""
    first = group.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
