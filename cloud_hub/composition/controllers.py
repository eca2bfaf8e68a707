"""The rooms that bring about what operators want: releases, rollouts of them, and federated runs."""

from __future__ import annotations

from cloud_hub.composition.foundation import Foundation
from cloud_hub.devices import desk as devices_room
from cloud_hub.ground.post import Post
from cloud_hub.releases import desk as releases_room
from cloud_hub.rollouts import desk as rollouts_room
from cloud_hub.rounds import desk as rounds_room
from cloud_hub.telemetry import desk as telemetry_room


def releases(foundation: Foundation, *, devices: devices_room.Desk, post: Post) -> releases_room.Desk:
    """The releases room."""
    return releases_room.Desk(
        data=foundation.config.folder.root,
        database=foundation.database,
        clock=foundation.clock,
        metrics=foundation.metrics,
        keys=foundation.keys,
        fleet=devices,
        post=post,
        bus=foundation.bus,
        settings=releases_room.ReleaseSettings(),
        sure_ms=foundation.time.sure_ms,
    )


def rollouts(
    foundation: Foundation, *, devices: devices_room.Desk, releases: releases_room.Desk, telemetry: telemetry_room.Desk
) -> rollouts_room.Desk:
    """The rollouts room; it assigns through the releases room and reads the figures of telemetry."""
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


def rounds(
    foundation: Foundation, *, devices: devices_room.Desk, releases: releases_room.Desk, post: Post
) -> rounds_room.Desk:
    """The rounds room; results of runs become models of the releases room."""
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
