"""The rooms that take in what devices send: who is there and what they report, records and figures."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from cloud_hub.composition.foundation import Foundation
from cloud_hub.devices import desk as devices_room
from cloud_hub.ground.access import BrokerAccess
from cloud_hub.ground.post import Post
from cloud_hub.ground.switchboard import Rooms, Switchboard
from cloud_hub.rounds import desk as rounds_room
from cloud_hub.telemetry import desk as telemetry_room
from shared.ids import DeviceId
from shared.wire.messages import Ack


def standings(foundation: Foundation, access: BrokerAccess) -> devices_room.Standings:
    """Who is welcome, and the broker's door that is closed to the others."""
    return devices_room.Standings(
        database=foundation.database,
        clock=foundation.clock,
        access=access,
        lists=foundation.lists,
        bus=foundation.bus,
        metrics=foundation.metrics,
        # A managed broker begins without sessions; one that is not ours may have kept those of revoked devices.
        kicks_at_start=foundation.config.broker.mode == "external",
    )


def devices(
    foundation: Foundation, *, root: Callable[[], Awaitable[str]], standings: devices_room.Standings
) -> devices_room.Desk:
    """The devices room; `root` tells the metadata that new devices begin to trust with."""
    config = foundation.config
    return devices_room.Desk(
        database=foundation.database,
        clock=foundation.clock,
        authorities=foundation.authorities,
        bus=foundation.bus,
        metrics=foundation.metrics,
        settings=devices_room.EnrolSettings(
            hub_url=config.hub_url,
            broker=devices_room.BrokerAddress(host=config.broker_host, port=config.broker.port),
            certificate_days=config.certificates.device_days,
            renew_expired_days=config.certificates.renew_expired_days,
        ),
        root=root,
        standings=standings,
    )


def telemetry(foundation: Foundation, post: Post) -> telemetry_room.Desk:
    """The telemetry room; what it has committed is acknowledged by the post."""

    async def send_ack(device: DeviceId, ack: Ack) -> None:
        # The device sends a batch again until it is answered, so nothing rests on this message arriving.
        await post.send(device, ack, leaf="ack", qos=0)

    return telemetry_room.Desk(
        database=foundation.database, clock=foundation.clock, metrics=foundation.metrics, send_ack=send_ack
    )


def switchboard(
    foundation: Foundation, *, devices: devices_room.Desk, telemetry: telemetry_room.Desk, rounds: rounds_room.Desk
) -> Switchboard:
    """Who is handed which message."""
    return Switchboard(
        rooms=Rooms(
            birth=devices.born,
            death=devices.died,
            reported=devices.reported,
            batches=telemetry.take,
            round_reply=rounds.replied,
        ),
        metrics=foundation.metrics,
        takes=devices.standings.takes,
    )
