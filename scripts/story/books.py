"""Compares what the applications know was done with what the hub has counted, record by record."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Final

from cloud_hub.cli.hub import Document

from .cast import Device, House
from .telling import require, until

SETTLED_S: Final = 30.0
PAGE: Final = 500
TITLES: Final = ("device", "answers", "truths", "missing", "twice", "holes", "resent, counted once")


@dataclass(frozen=True, slots=True)
class Counted:
    """One device in the hub's books.

    Attributes:
        results, outcomes: records of that kind that the hub has.
        missing: answers or truths that must be there and are not.
        twice: requests that the hub has counted more than once.
        gaps: numbers that are missing in the sequence of any class.
        resent: records that came again and were recognised.
        unrecorded: answers given right before a kill that had not reached the disk; only these may be lost.
    """

    device: str
    results: int
    outcomes: int
    missing: int
    twice: int
    gaps: int
    resent: int
    unrecorded: int

    def row(self) -> list[object]:
        """For the table."""
        return [self.device, self.results, self.outcomes, self.missing, self.twice, self.gaps, self.resent]


def wait_settled(house: House, *, seconds: float = SETTLED_S) -> None:
    """Wait until no device has anything left that the hub has not acknowledged."""
    for device in house.devices:
        until(f"the queue of {device.name} is empty", device.is_settled, seconds=seconds)


def compare(house: House, device: Device) -> Counted:
    """Hold our list of requests against the hub's records of this device; raises NotTrue when they disagree."""
    results = _requests(house, device, "result", kind="result")
    outcomes = _requests(house, device, "outcome", kind="outcome")
    must = set(device.answered) - device.unsure
    missing = [request for request in sorted(must) if results[request] == 0]
    missing += [request for request in sorted(device.confirmed) if outcomes[request] == 0]
    twice = [request for counts in (results, outcomes) for request, count in counts.items() if count > 1]
    require(not missing, f"the hub misses {len(missing)} records of {device.name}, the first is {missing[:1]}")
    require(not twice, f"the hub counted {len(twice)} requests of {device.name} more than once: {twice[:3]}")
    summary = house.operator.hub().get(f"/v1/telemetry/{device.name}/summary", Document)
    streams = summary["streams"]
    for stream in streams:
        numbered = stream["last"] - stream["first"] + 1
        whole = stream["first"] == 1 and stream["records"] == numbered and stream["missing_records"] == 0
        require(whole, f"the records of {device.name} are numbered from 1 without a hole: {stream}")
        require(stream["conflicts"] == 0, f"{device.name}: no number was used for two different records: {stream}")
    return Counted(
        device=device.name,
        results=sum(results.values()),
        outcomes=sum(outcomes.values()),
        missing=len(missing),
        twice=len(twice),
        gaps=sum(stream["missing_ranges"] for stream in streams),
        resent=sum(stream["duplicates"] for stream in streams),
        unrecorded=sum(1 for request in device.unsure if results[request] == 0),
    )


def events(house: House, device: Device) -> list[dict[str, Any]]:
    """What happened to a device, by its own account, oldest first: `name` and `detail`."""
    return [item["body"] for item in _items(house, device, "event") if item["kind"] == "event"]


def late_labels(house: House, device: Device) -> int:
    """How many late answers of the hub's larger model are kept as labels."""
    items = _items(house, device, "outcome")
    return sum(1 for item in items if item["kind"] == "outcome" and item["body"].get("source") == "hub")


def _requests(house: House, device: Device, klass: str, *, kind: str) -> Counter[str]:
    """How many records of this kind there are by request, those of the application: the hub may add its own word."""
    bodies = [item["body"] for item in _items(house, device, klass) if item["kind"] == kind]
    return Counter(str(body["request"]) for body in bodies if not body.get("source"))


def _items(house: House, device: Device, klass: str) -> list[Document]:
    query: dict[str, Any] = {"class": klass, "limit": PAGE}
    return house.operator.hub().items(f"/v1/telemetry/{device.name}", **query)
