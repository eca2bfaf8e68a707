"""The composition root of `outrider-hub serve`: checks what it stands on, builds the rooms, owns every task.

Order of start: database, certificates, ports; then the broker, the link to it, the rooms' own loops and HTTPS. The hub
is ready when devices and operators can both reach it. Order of end: whoever takes work first, the broker last.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import uvloop
from fastapi import APIRouter, FastAPI
from starlette.types import ASGIApp

import shared
from cloud_hub.config import HubConfig
from cloud_hub.devices import desk as devices_room
from cloud_hub.devices import routes as device_routes
from cloud_hub.devices import token_routes
from cloud_hub.ground import broker as managed_broker
from cloud_hub.ground import migrate, problems, tlsport, transport
from cloud_hub.ground import routes as ground_routes
from cloud_hub.ground.auth import Gate
from cloud_hub.ground.bounds import Bounds
from cloud_hub.ground.broker import Broker, BrokerSettings
from cloud_hub.ground.bus import Bus
from cloud_hub.ground.ca import Authority
from cloud_hub.ground.courier import HubCourier, Inbound, Link, LinkSettings
from cloud_hub.ground.database import Database
from cloud_hub.ground.metrics import Metrics
from cloud_hub.ground.post import Post, Publish
from cloud_hub.ground.rates import Buckets
from cloud_hub.ground.readiness import notify
from cloud_hub.ground.switchboard import Rooms, Switchboard
from cloud_hub.ground.system import SystemClock, raise_file_limit, take_turns_sooner
from cloud_hub.ground.tlsport import HttpsServer
from cloud_hub.keyring import Keyring
from cloud_hub.offload import asgi as offload_routes
from cloud_hub.offload import desk as offload_room
from cloud_hub.offload.registry import Registry
from cloud_hub.releases import desk as releases_room
from cloud_hub.releases import routes as release_routes
from cloud_hub.rollouts import desk as rollouts_room
from cloud_hub.rollouts import routes as rollout_routes
from cloud_hub.rounds import desk as rounds_room
from cloud_hub.rounds import routes as round_routes
from cloud_hub.telemetry import desk as telemetry_room
from cloud_hub.telemetry import routes as telemetry_routes
from shared.clock import Clock
from shared.errors import ConfigError, OutriderError, Unreachable
from shared.ids import DeviceId
from shared.wire.messages import Ack

logger = logging.getLogger(__name__)

LINK_S: Final = 20.0
RENEW_LOOK_S: Final = 3600.0
ENROL_BURST: Final = 60
ENROL_PER_MINUTE: Final = 60
INFER_BURST: Final = 1000
INFER_PER_MINUTE: Final = 30_000
"""How often one principal may ask for answers: a fleet's devices share the engines."""


@dataclass(frozen=True, slots=True)
class Foundation:
    """What every room is given."""

    config: HubConfig
    clock: Clock
    database: Database
    authority: Authority
    metrics: Metrics
    bus: Bus
    link: Link
    keys: releases_room.OnlineKeys


@dataclass(frozen=True, slots=True)
class House:
    """The rooms, and what runs in them for as long as the hub does."""

    app: ASGIApp
    switchboard: Switchboard
    devices: devices_room.Desk
    releases: releases_room.Desk
    loops: tuple[Callable[[], Awaitable[None]], ...]


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
        authority = transport.load_authority(config.folder)
        renew_certificates(config, authority, clock=clock)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            foundation = Foundation(
                config=config,
                clock=clock,
                database=database,
                authority=authority,
                metrics=Metrics(),
                bus=Bus(),
                link=Link(clock),
                keys=online_keys(config),
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


def online_keys(config: HubConfig) -> releases_room.OnlineKeys:
    """The keys that the hub signs with by itself; raises ConfigError when one is missing or open to others."""
    keyring = Keyring(config.folder.keys)
    return releases_room.OnlineKeys(
        snapshot=keyring.signer("snapshot"),
        timestamp=keyring.signer("timestamp"),
        assignment=keyring.signer("assignment"),
    )


def renew_certificates(config: HubConfig, authority: Authority, *, clock: Clock) -> tuple[str, ...]:
    """Issue the certificates of our ports anew where names changed or they end soon; returns what was issued."""
    now_ms = clock.wall_ms()
    if authority.expires_ms <= now_ms:
        raise ConfigError(
            "the hub's CA has expired", code="config.ca_expired", hint="check the machine's clock; else make a new hub"
        )
    issued = transport.ensure(
        config.folder,
        authority,
        names=config.server_names,
        broker_names=config.broker_names,
        now_ms=now_ms,
        days=config.certificates.server_days,
    )
    if issued:
        logger.info("certificates issued: %s", ", ".join(issued))
    return issued


async def _renew_in_time(foundation: Foundation, *, reload: Callable[[], None]) -> None:
    """Renew certificates while the hub runs, long before they end: a hub that is never restarted must not go dark.

    Listeners load the new ones for new connections; the hub's own link to the broker does so when it next connects.
    """
    while True:
        await asyncio.sleep(RENEW_LOOK_S)
        try:
            renew = partial(renew_certificates, foundation.config, foundation.authority, clock=foundation.clock)
            if await asyncio.to_thread(renew):
                reload()
        except OutriderError as error:
            logger.error("certificates cannot be renewed: %s", error.message)


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
                return await _serve_rooms(
                    foundation, listener=listener, stop=stop, announce=announce, manager=manager, reload_broker=reload
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
) -> int:
    config = foundation.config
    # The courier needs someone to hand messages to, the rooms need someone to send with: a short way round.
    inbox: list[Switchboard] = []

    def deliver(messages: Sequence[Inbound]) -> None:
        inbox[0].put(messages)

    courier = HubCourier(_link_settings(config), on_messages=deliver, metrics=foundation.metrics, link=foundation.link)
    house = compose(foundation, publish=courier.publish, parts=lambda: {"broker": courier.is_connected})
    inbox.append(house.switchboard)
    house.releases.open()
    await house.devices.start()
    https_up, link_up = asyncio.Event(), asyncio.Event()
    server = HttpsServer(
        house.app,
        certificate=config.folder.server_certificate,
        key=config.folder.server_key,
        ca=config.folder.ca_certificate,
        ready=https_up,
    )

    def reload() -> None:
        server.reload_certificate()
        reload_broker()

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_forever(loop)) for loop in house.loops]
        tasks += [
            group.create_task(house.switchboard.run()),
            group.create_task(courier.run(ready=link_up)),
            group.create_task(server.run_on(listener)),
            group.create_task(_renew_in_time(foundation, reload=reload)),
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


def compose(foundation: Foundation, *, publish: Publish, parts: Callable[[], Mapping[str, bool]]) -> House:
    """Build the rooms and the application around them; starts nothing."""
    config, clock, database = foundation.config, foundation.clock, foundation.database
    post = Post(publish=publish, clock=clock)

    async def root() -> str:
        return await releases.root()

    devices = _devices(foundation, root=root)
    releases = releases_room.Desk(
        data=config.folder.root,
        database=database,
        clock=clock,
        metrics=foundation.metrics,
        keys=foundation.keys,
        fleet=devices,
        post=post,
        bus=foundation.bus,
        settings=releases_room.ReleaseSettings(),
    )
    telemetry = _telemetry(foundation, post)
    rollouts = _rollouts(foundation, devices=devices, releases=releases, telemetry=telemetry)
    rounds = _rounds(foundation, devices=devices, releases=releases, post=post)
    switchboard = Switchboard(
        rooms=Rooms(
            birth=devices.born,
            death=devices.died,
            reported=devices.reported,
            batches=telemetry.take,
            round_reply=rounds.replied,
        ),
        metrics=foundation.metrics,
    )
    gate = Gate(database=database, clock=clock, device_of=devices.device_of)
    offload = _offload(foundation, releases)
    app = _application(
        foundation,
        offload=_offload_app(offload, gate),
        routers=(
            ground_routes.router,
            device_routes.router,
            token_routes.router,
            release_routes.router(releases),
            telemetry_routes.router,
            rollout_routes.router(rollouts),
            round_routes.router(rounds),
        ),
        state={"gate": gate, "parts": parts, "devices": devices, "telemetry": telemetry},
    )
    loops = (releases.run, offload.run, rollouts.run, rounds.run)
    return House(app=app, switchboard=switchboard, devices=devices, releases=releases, loops=loops)


def _telemetry(foundation: Foundation, post: Post) -> telemetry_room.Desk:
    async def send_ack(device: DeviceId, ack: Ack) -> None:
        # The device sends a batch again until it is answered, so nothing rests on this message arriving.
        await post.send(device, ack, leaf="ack", qos=0)

    return telemetry_room.Desk(
        database=foundation.database, clock=foundation.clock, metrics=foundation.metrics, send_ack=send_ack
    )


def _rollouts(
    foundation: Foundation, *, devices: devices_room.Desk, releases: releases_room.Desk, telemetry: telemetry_room.Desk
) -> rollouts_room.Desk:
    return rollouts_room.Desk(
        database=foundation.database,
        clock=foundation.clock,
        metrics=foundation.metrics,
        fleet=devices,
        releases=releases,
        figures=telemetry,
        bus=foundation.bus,
        link=foundation.link.up_since_ms,
    )


def _rounds(
    foundation: Foundation, *, devices: devices_room.Desk, releases: releases_room.Desk, post: Post
) -> rounds_room.Desk:
    return rounds_room.Desk(
        data=foundation.config.folder.root,
        database=foundation.database,
        clock=foundation.clock,
        metrics=foundation.metrics,
        post=post,
        bus=foundation.bus,
        devices=devices,
        releases=releases,
    )


def _devices(foundation: Foundation, *, root: Callable[[], Awaitable[str]]) -> devices_room.Desk:
    config = foundation.config
    return devices_room.Desk(
        database=foundation.database,
        clock=foundation.clock,
        authority=foundation.authority,
        bus=foundation.bus,
        metrics=foundation.metrics,
        settings=devices_room.EnrolSettings(
            hub_url=config.hub_url,
            broker=devices_room.BrokerAddress(host=config.broker_host, port=config.broker.port),
            certificate_days=config.certificates.device_days,
        ),
        root=root,
    )


def _offload(foundation: Foundation, releases: releases_room.Desk) -> offload_room.Desk:
    now_us = SystemClock().mono_us
    return offload_room.Desk(
        releases=Registry(releases=releases, now_us=now_us),
        metrics=foundation.metrics,
        now_us=now_us,
        settings=offload_room.OffloadSettings(),
    )


def _offload_app(desk: offload_room.Desk, gate: Gate) -> offload_routes.OffloadApp:
    return offload_routes.OffloadApp(
        desk=desk,
        gate=gate,
        rate=Buckets(burst=INFER_BURST, per_minute=INFER_PER_MINUTE),
        now_us=SystemClock().mono_us,
    )


def _application(
    foundation: Foundation,
    *,
    offload: offload_routes.OffloadApp,
    routers: tuple[APIRouter, ...],
    state: Mapping[str, Any],
) -> ASGIApp:
    config = foundation.config
    app = FastAPI(
        title="Outrider hub",
        version=version("outrider"),
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        # It would send callers to whatever host their request names.
        redirect_slashes=False,
    )
    problems.install(app)
    for router in routers:
        app.include_router(router)
    common: dict[str, Any] = {
        "database": foundation.database,
        "clock": foundation.clock,
        "metrics": foundation.metrics,
        "metrics_open": config.metrics.open,
        "ca_pem": foundation.authority.pem,
        "enrol_rate": Buckets(burst=ENROL_BURST, per_minute=ENROL_PER_MINUTE),
        "token_ttl": {"join": config.tokens.join_ttl_s * 1000, "api": config.tokens.api_ttl_s * 1000},
    }
    for name, value in {**common, **state}.items():
        setattr(app.state, name, value)
    return Bounds(
        offload_routes.Beside(app, offload),
        metrics=foundation.metrics,
        clock=foundation.clock,
        streamed=(release_routes.STREAMED_PREFIX, offload_routes.STREAMED_PREFIX, round_routes.STREAMED_PREFIX),
    )


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
        folder=config.folder.broker, host=config.broker.host, port=config.broker.port, binary=config.broker.binary
    )


def _link_settings(config: HubConfig) -> LinkSettings:
    folder = config.folder.broker
    managed = config.broker.mode == "managed"
    return LinkSettings(
        host=managed_broker.local_address(config.broker.host) if managed else config.broker.host,
        port=config.broker.port,
        ca=folder / "ca.pem",
        certificate=folder / "hub.pem",
        key=folder / "hub.key",
    )


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first real error of a group of groups: what the person is told."""
    first = group.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
