"""The steps `cloud-gone` and `cloud-back`: devices go on alone, and afterwards nothing is missing and nothing twice."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import Final

from . import books
from .cast import House
from .telling import Figure, Teller, expect, require, until
from .work import ask_all

GONE_ROWS: Final = 100
OFFLINE_S: Final = 15.0


def cloud_gone(house: House, tell: Teller) -> Mapping[str, Figure]:
    """kill -9 the hub and the broker; the devices answer on, and their queues grow by exactly what they did."""
    books.wait_settled(house)
    house.cloud.kill()
    for device in house.devices:
        until(f"{device.name} notices that the broker is gone", device.is_offline, seconds=OFFLINE_S)
    before = {device.name: device.waiting() for device in house.devices}
    tell.say("The hub and its broker were killed with kill -9. The devices are alone now.")
    tallies = ask_all(house, range(GONE_ROWS), title="gone")
    rows = []
    for device in house.devices:
        tally = tallies[device.name]
        expect(f"answers of {device.name} without the cloud", wanted=GONE_ROWS, found=tally.asked)
        expect(f"versions that answered on {device.name}", wanted={house.served}, found=tally.versions)
        wanted = before[device.name] + 2 * GONE_ROWS
        until(f"the queue of {device.name} holds all", partial(device.has_waiting, wanted), seconds=5)
        grown = device.waiting() - before[device.name]
        rows.append([device.name, tally.asked, f"{tally.accuracy:.1%}", before[device.name], device.waiting(), grown])
    tell.table(["device", "answered", "accuracy", "queue before", "queue now", "grown by"], rows)
    tell.say(
        f"All {3 * GONE_ROWS} questions were answered as before, and every answer and every truth waits on the "
        "device's disk for the hub."
    )
    return {
        "answered": sum(tally.asked for tally in tallies.values()),
        "queued": sum(device.waiting() for device in house.devices),
        **{f"queue_{device.name}": device.waiting() for device in house.devices},
    }


def cloud_back(house: House, tell: Teller) -> Mapping[str, Figure]:
    """Start the hub again; when the queues are empty, compare its books with ours, record by record."""
    waited = sum(device.waiting() for device in house.devices)
    began = time.monotonic()
    house.cloud.start()
    for device in house.devices:
        device.wait_online()
    books.wait_settled(house)
    took_s = time.monotonic() - began
    counted = [books.compare(house, device) for device in house.devices]
    tell.table(books.TITLES, [count.row() for count in counted])
    require(all(count.missing == count.twice == 0 for count in counted), "nothing is missing and nothing is twice")
    tell.say(
        f"The hub is back. All {waited} queued records arrived within {took_s:.1f} s; by the hub's own books every "
        "answer and every truth is there exactly once, and the numbering of every queue has no hole."
    )
    return {
        "queued": waited,
        "drain_seconds": round(took_s, 2),
        "results": sum(count.results for count in counted),
        "outcomes": sum(count.outcomes for count in counted),
        "missing": sum(count.missing for count in counted),
        "twice": sum(count.twice for count in counted),
        "gaps": sum(count.gaps for count in counted),
    }
