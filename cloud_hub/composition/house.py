"""The whole hub: its rooms, and the application around them. Builds, and starts nothing."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from starlette.types import ASGIApp

from cloud_hub.composition import controllers, ingest, web
from cloud_hub.composition.foundation import Foundation
from cloud_hub.devices import desk as devices_room
from cloud_hub.devices import routes as device_routes
from cloud_hub.devices import standing_routes, token_routes
from cloud_hub.ground import routes as ground_routes
from cloud_hub.ground.access import BrokerAccess
from cloud_hub.ground.auth import Gate
from cloud_hub.ground.post import Post, Publish
from cloud_hub.ground.switchboard import Switchboard
from cloud_hub.releases import desk as releases_room
from cloud_hub.releases import routes as release_routes
from cloud_hub.rollouts import routes as rollout_routes
from cloud_hub.rounds import routes as round_routes
from cloud_hub.telemetry import routes as telemetry_routes


@dataclass(frozen=True, slots=True)
class House:
    """The rooms, and what runs in them for as long as the hub does."""

    app: ASGIApp
    switchboard: Switchboard
    devices: devices_room.Desk
    releases: releases_room.Desk
    loops: tuple[Callable[[], Awaitable[None]], ...]


def compose(
    foundation: Foundation, *, publish: Publish, parts: Callable[[], Mapping[str, bool]], access: BrokerAccess
) -> House:
    """Build the rooms and the application around them.

    Args:
        foundation: what every room is given.
        publish: sends a message to a topic.
        parts: tells which parts of the hub are up.
        access: keeps devices out of the broker.
    """
    standings = ingest.standings(foundation, access)
    post = Post(publish=publish, clock=foundation.clock, is_welcome=standings.is_welcome)

    async def root() -> str:
        return await releases.root()

    devices = ingest.devices(foundation, root=root, standings=standings)
    releases = controllers.releases(foundation, devices=devices, post=post)
    telemetry = ingest.telemetry(foundation, post)
    rollouts = controllers.rollouts(foundation, devices=devices, releases=releases, telemetry=telemetry)
    rounds = controllers.rounds(foundation, devices=devices, releases=releases, post=post)
    gate = Gate(database=foundation.database, clock=foundation.clock, device_of=devices.device_of)
    offload = web.offload(foundation, releases)
    app = web.application(
        foundation,
        offload=web.offload_app(offload, gate),
        routers=(
            ground_routes.router,
            device_routes.router,
            token_routes.router,
            standing_routes.router,
            release_routes.router(releases),
            telemetry_routes.router,
            rollout_routes.router(rollouts),
            round_routes.router(rounds),
        ),
        state={"gate": gate, "parts": parts, "devices": devices, "telemetry": telemetry},
    )
    return House(
        app=app,
        switchboard=ingest.switchboard(foundation, devices=devices, telemetry=telemetry, rounds=rounds),
        devices=devices,
        releases=releases,
        loops=(releases.run, offload.run, rollouts.run, rounds.run, standings.run, foundation.time.run),
    )
