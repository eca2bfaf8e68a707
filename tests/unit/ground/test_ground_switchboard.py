"""Messages reach the right room in order; everything else is counted; all are settled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from cloud_hub.ground import switchboard
from cloud_hub.ground.metrics import Metrics
from cloud_hub.ground.switchboard import LANE_DEPTH, Rooms, Sealed, Switchboard
from shared.errors import StorageError
from shared.ids import DeviceId
from shared.telemetry import BatchId
from shared.wire import topics
from shared.wire.envelope import Envelope, encode_envelope
from shared.wire.messages import Batch, Birth, Death, Message, Reported
from tests.fakes.hub_parts import envelope_of

DEVICE = DeviceId("pi-1")
BIRTH = Birth(boot=1, epoch="0" * 16, agent_version="1", profile="p")
DEATH = Death(boot=1, session=1)
REPORTED = Reported(revision=1, assignment_version=0, models=())
BATCH = Batch(batch=BatchId(epoch="0" * 16, klass=2, first=1, last=1, digest="0" * 64), columns=b"")


@dataclass
class Seen:
    """What the rooms were given, and what they answer with."""

    messages: list[tuple[str, Message]] = field(default_factory=list)
    error: Exception | None = None
    groups: list[int] = field(default_factory=list)

    async def take(self, device: DeviceId, _envelope: Envelope, message: Message) -> None:
        self.messages.append((device, message))
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error

    def rooms(self) -> Rooms:
        return Rooms(birth=self.take, death=self.take, reported=self.take, batches=self.take_all, round_reply=self.take)

    async def take_all(self, sealed: Sequence[Sealed]) -> None:
        self.groups.append(len(sealed))
        self.messages += [found for one in sealed if (found := one.open()) is not None]
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error


@dataclass(frozen=True)
class Parcel:
    """A delivery that notes its settlement."""

    topic: str
    payload: bytes
    settle: Callable[[], None]


def encoded(message: Message, *, device: str = DEVICE, envelope_id: str = "m1") -> bytes:
    return encode_envelope(envelope_of(message, device=device, envelope_id=envelope_id))


def outcome(metrics: Metrics, leaf: str, name: str) -> float:
    return metrics.registry.get_sample_value("outrider_hub_messages_total", {"leaf": leaf, "outcome": name}) or 0.0


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        ("birth", BIRTH),
        ("death", DEATH),
        ("reported", REPORTED),
    ],
)
def test_what_belongs_arrives(leaf: topics.UpLeaf, message: Message) -> None:
    seen, metrics = Seen(), Metrics()
    board = Switchboard(rooms=seen.rooms(), metrics=metrics)
    asyncio.run(board.receive(topics.up(DEVICE, leaf), encoded(message)))
    assert seen.messages == [(DEVICE, message)]
    assert outcome(metrics, leaf, "ok") == 1


@pytest.mark.parametrize(
    ("topic", "payload", "leaf", "code"),
    [
        (topics.up(DEVICE, "birth"), encoded(BIRTH, device="pi-2"), "birth", "protocol.misaddressed"),
        (topics.up(DEVICE, "birth"), b"nonsense", "birth", "protocol.envelope"),
        (topics.up(DEVICE, "birth"), encoded(DEATH), "birth", "protocol.unexpected"),
        (topics.up(DEVICE, "job"), encoded(BIRTH), "job", "protocol.unexpected"),
        ("outrider/1/pi-1/up/nonsense", encoded(BIRTH), "other", "protocol.topic"),
        ("outrider/1/pi-1/up/birth/deeper", encoded(BIRTH), "other", "protocol.topic"),
        ("outrider/1/HUB/up/birth", encoded(BIRTH), "birth", "protocol.topic"),
    ],
)
def test_what_does_not_belong_is_counted(topic: str, payload: bytes, leaf: str, code: str) -> None:
    seen, metrics = Seen(), Metrics()
    asyncio.run(Switchboard(rooms=seen.rooms(), metrics=metrics).receive(topic, payload))
    assert seen.messages == []
    assert outcome(metrics, leaf, code) == 1


@pytest.mark.parametrize("error", [StorageError("full"), ZeroDivisionError()])
def test_a_room_that_fails_is_counted_and_ends_nothing(error: Exception) -> None:
    seen, metrics = Seen(error=error), Metrics()
    asyncio.run(Switchboard(rooms=seen.rooms(), metrics=metrics).receive(topics.up(DEVICE, "birth"), encoded(BIRTH)))
    assert outcome(metrics, "birth", "failed") == 1


def test_a_device_is_heard_in_order_and_all_is_settled() -> None:
    seen, metrics = Seen(), Metrics()
    settled: list[int] = []

    async def play() -> None:
        board = Switchboard(rooms=seen.rooms(), metrics=metrics)
        sent: list[Message] = [Reported(revision=number, assignment_version=0, models=()) for number in range(20)]
        for number, message in enumerate([BIRTH, *sent, DEATH]):
            leaf: topics.UpLeaf = "birth" if number == 0 else "death" if message is DEATH else "reported"
            board.put([Parcel(topics.up(DEVICE, leaf), encoded(message), lambda number=number: settled.append(number))])  # type: ignore[misc]
        board.put([Parcel("rubbish", b"", lambda: settled.append(99))])
        async with asyncio.timeout(10), asyncio.TaskGroup() as group:
            running = group.create_task(board.run())
            while len(settled) < 23:
                await asyncio.sleep(0)
            running.cancel()

    asyncio.run(play())
    assert [message for _, message in seen.messages] == [
        BIRTH,
        *(Reported(revision=number, assignment_version=0, models=()) for number in range(20)),
        DEATH,
    ]
    assert sorted(settled) == [*range(22), 99]


def test_a_flood_is_counted_and_settled() -> None:
    seen, metrics = Seen(), Metrics()
    settled: list[int] = []

    async def play() -> None:
        board = Switchboard(rooms=seen.rooms(), metrics=metrics)
        parcel = Parcel(topics.up(DEVICE, "reported"), encoded(REPORTED), lambda: settled.append(1))
        board.put([parcel] * (LANE_DEPTH + 7))

    asyncio.run(play())
    assert outcome(metrics, "reported", "overflow") == 7
    assert len(settled) == 7


def emptied(seen: Seen, metrics: Metrics, parcels: Sequence[tuple[str, bytes]]) -> list[int]:
    """Put all of these at once, have them dealt with, and return which were settled, in order."""
    settled: list[int] = []

    async def play() -> None:
        board = Switchboard(rooms=seen.rooms(), metrics=metrics)
        board.put([Parcel(topic, payload, lambda n=n: settled.append(n)) for n, (topic, payload) in enumerate(parcels)])  # type: ignore[misc]
        async with asyncio.timeout(10), asyncio.TaskGroup() as group:
            running = group.create_task(board.run())
            while len(settled) < len(parcels):
                await asyncio.sleep(0)
            running.cancel()

    asyncio.run(play())
    return settled


def test_batches_of_all_leaves_are_handed_over_together_and_settled_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(switchboard, "MAX_GROUP", 4)
    seen, metrics = Seen(), Metrics()
    leaves: list[topics.UpLeaf] = ["telemetry", "outcome", "event", "telemetry", "event"]
    assert emptied(seen, metrics, [(topics.up(DEVICE, leaf), encoded(BATCH)) for leaf in leaves]) == [0, 1, 2, 3, 4]
    assert seen.groups == [4, 1]
    assert seen.messages == [(DEVICE, BATCH)] * 5
    assert [outcome(metrics, leaf, "ok") for leaf in ("telemetry", "outcome", "event")] == [2, 1, 2]


def test_a_batch_that_is_none_spoils_no_other() -> None:
    seen, metrics = Seen(), Metrics()
    topic = topics.up(DEVICE, "telemetry")
    parcels = [
        (topic, b"nonsense"),
        (topic, encoded(BATCH)),
        (topic, encoded(BIRTH)),
        (topic, encoded(BATCH, device="pi-2")),
        ("outrider/1/HUB/up/telemetry", encoded(BATCH)),
    ]
    assert emptied(seen, metrics, parcels) == [0, 1, 2, 3, 4]
    assert seen.messages == [(DEVICE, BATCH)]
    codes = ("protocol.envelope", "ok", "protocol.unexpected", "protocol.misaddressed", "protocol.topic")
    assert [outcome(metrics, "telemetry", code) for code in codes] == [1] * 5


@pytest.mark.parametrize("error", [StorageError("full"), ZeroDivisionError()])
def test_batches_that_cannot_be_stored_are_counted_and_settled(error: Exception) -> None:
    seen, metrics = Seen(error=error), Metrics()
    assert emptied(seen, metrics, [(topics.up(DEVICE, "event"), encoded(BATCH))] * 3) == [0, 1, 2]
    assert outcome(metrics, "event", "failed") == 3


def test_more_batches_than_may_wait_are_counted_and_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(switchboard, "MAX_WAITING", 3)
    seen, metrics = Seen(), Metrics()
    assert sorted(emptied(seen, metrics, [(topics.up(DEVICE, "event"), encoded(BATCH))] * 5)) == [0, 1, 2, 3, 4]
    assert outcome(metrics, "event", "overflow") == 2
    assert len(seen.messages) == 3


def test_of_who_is_barred_nothing_is_taken_and_all_is_settled_and_counted() -> None:
    seen, metrics, settled = Seen(), Metrics(), 0

    def settle() -> None:
        nonlocal settled
        settled += 1

    def takes(device: str, leaf: str) -> bool:
        return device != "pi-2" or leaf == "birth"

    async def run() -> None:
        board = Switchboard(rooms=seen.rooms(), metrics=metrics, takes=takes)
        sent = [(device, leaf) for device in ("pi-2", DEVICE) for leaf in ("telemetry", "reported", "birth")]
        bodies: dict[str, Message] = {"telemetry": BATCH, "reported": REPORTED, "birth": BIRTH}
        parcels = [
            Parcel(f"outrider/1/{device}/up/{leaf}", encoded(bodies[leaf], device=device), settle)
            for device, leaf in sent
        ]
        async with asyncio.timeout(10), asyncio.TaskGroup() as group:
            running = group.create_task(board.run())
            board.put(parcels)
            while settled < len(parcels):
                await asyncio.sleep(0)
            running.cancel()

    asyncio.run(run())
    assert sorted((device, type(message).__name__) for device, message in seen.messages) == [
        (DEVICE, "Batch"),
        (DEVICE, "Birth"),
        (DEVICE, "Reported"),
        ("pi-2", "Birth"),
    ]
    assert (outcome(metrics, "telemetry", "barred"), outcome(metrics, "reported", "barred")) == (1, 1)
