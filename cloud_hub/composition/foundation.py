"""What every room of the hub is given."""

from __future__ import annotations

from dataclasses import dataclass

from cloud_hub.config import HubConfig
from cloud_hub.ground.authorities import Authorities
from cloud_hub.ground.bus import Bus
from cloud_hub.ground.courier import Link
from cloud_hub.ground.database import Database
from cloud_hub.ground.metrics import Metrics
from cloud_hub.ground.revocation import AccessLists
from cloud_hub.ground.walltime import WallTime
from cloud_hub.releases.desk import KeySource
from shared.clock import Clock


@dataclass(frozen=True, slots=True)
class Foundation:
    """What every room is given."""

    config: HubConfig
    clock: Clock
    database: Database
    authorities: Authorities
    metrics: Metrics
    bus: Bus
    link: Link
    keys: KeySource
    lists: AccessLists
    time: WallTime
