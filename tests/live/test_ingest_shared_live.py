"""Two hubs on one database share a broker's messages: whatever repeats and in whatever order, each batch counts once.

Each hub is a process with the real courier, switchboard and telemetry desk. Devices repeat batches, send them out of
order and in other boundaries, and one hub is killed on the way.
"""

from __future__ import annotations

import random
import signal
import threading
import time
from typing import Any

import paho.mqtt.client as mqtt
import pytest
import sqlalchemy as sa
from paho.mqtt.enums import CallbackAPIVersion

from cloud_hub.ground.database import Database
from cloud_hub.telemetry import tables
from cloud_hub.telemetry.rules import explode
from shared.ids import DeviceId
from shared.ranges import ranges_of
from shared.telemetry import BatchId, Record, RecordClass, Result
from shared.wire import topics
from shared.wire.envelope import decode_envelope, encode_envelope
from shared.wire.messages import Ack, Batch, expect
from tests.fakes.batches import batch_of, gap_of
from tests.fakes.hub_parts import envelope_of
from tests.fakes.ingest_place import IngestPlace, ingest_place

pytestmark = [pytest.mark.live, pytest.mark.timeout(180)]

DEVICES = [DeviceId(f"pi-{number}") for number in range(4)]
HUBS = ["hub", "hub.b"]
BATCHES = 40
SIZE = 20
LOST = (BATCHES * SIZE + 1, BATCHES * SIZE + 50)
WAIT_S = 60.0


class Fleet:
    """Devices on one connection that keep what was answered."""

    def __init__(self, place: IngestPlace) -> None:
        self.statuses: dict[tuple[DeviceId, BatchId], list[str]] = {}
        subscribed = threading.Event()
        self._client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="fleet", protocol=mqtt.MQTTv5)
        self._client.max_inflight_messages_set(100)
        self._client.on_message = self._arrived
        self._client.on_subscribe = lambda *_: subscribed.set()
        self._client.connect("127.0.0.1", place.device_port)
        self._client.loop_start()
        self._client.subscribe("outrider/1/+/down/#", qos=1)
        assert subscribed.wait(WAIT_S)

    def send(self, device: DeviceId, batch: Batch) -> None:
        payload = encode_envelope(envelope_of(batch, device=device))
        self._client.publish(topics.up(device, "telemetry"), payload, qos=1)

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def _arrived(self, _client: mqtt.Client, _data: Any, message: mqtt.MQTTMessage) -> None:
        envelope = decode_envelope(bytes(message.payload))
        for verdict in expect(envelope, Ack).verdicts:
            key = DeviceId(envelope.device), verdict.batch
            self.statuses.setdefault(key, []).append(verdict.status)


def results(first: int, last: int) -> list[Record]:
    """Results, so that figures are counted too."""
    return [
        Record(
            seq=seq,
            at_ms=1000 + seq,
            body=Result(
                request=f"r{seq}", model="digits", version="1.0.0", variant="int8", rung="full", took_us=100 + seq
            ),
        )
        for seq in range(first, last + 1)
    ]


def batches_of_a_device() -> list[Batch]:
    """All records once in their own batches, some again in other boundaries, and a gap behind them."""
    own = [batch_of(results(n * SIZE + 1, (n + 1) * SIZE)) for n in range(BATCHES)]
    other = [batch_of(results(n * SIZE + 5, (n + 1) * SIZE + 4)) for n in range(0, BATCHES - 1, 5)]
    return [*own, *other, gap_of(*LOST, records=50, klass=RecordClass.RESULT)]


def send_all(fleet: Fleet, sent: dict[DeviceId, list[Batch]], chance: random.Random) -> None:
    plan = [(device, batch) for device, batches in sent.items() for batch in batches * 2]
    chance.shuffle(plan)
    for device, batch in plan:
        fleet.send(device, batch)


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_two_hubs_count_each_batch_once(kind: str, mosquitto_path: str, request: pytest.FixtureRequest) -> None:
    with ingest_place(mosquitto_path, hubs=HUBS) as place:
        url = f"sqlite:///{place.folder / 'hub.db'}"
        if kind == "postgresql":
            url = request.getfixturevalue("postgres_url")
        hubs = [place.hub(name, url) for name in HUBS]
        fleet = Fleet(place)
        chance = random.Random(4)
        sent = {device: batches_of_a_device() for device in DEVICES}
        try:
            send_all(fleet, sent, chance)
            for hub in hubs:
                assert hub.stdout is not None
                assert hub.stdout.readline() == "took\n"
            # One of the two ends without a farewell; what it had not answered is sent again, as devices do.
            hubs[1].send_signal(signal.SIGKILL)
            wanted = {(device, batch.batch) for device, batches in sent.items() for batch in batches}
            deadline = time.monotonic() + WAIT_S
            while missing := wanted - set(fleet.statuses):
                assert time.monotonic() < deadline, f"{len(missing)} batches are not answered"
                for device, claim in missing:
                    fleet.send(device, next(one for one in sent[device] if one.batch == claim))
                time.sleep(1.0)
        finally:
            fleet.close()
        database = Database(url)
        try:
            for device in DEVICES:
                check(database, device)
        finally:
            database.close()


def check(database: Database, device: DeviceId) -> None:
    """Each record is here once, in the rows, in what is known of the stream and in the figures."""
    ((stream, received),) = database.read_now(lambda conn: tables.list_streams(conn, device, limit=9))
    assert stream.klass is RecordClass.RESULT
    assert received.here == ((1, BATCHES * SIZE),)
    assert [(one.first, one.last) for one in received.lost] == [LOST]
    assert received.conflicts == 0
    c = tables.batches.c
    query = sa.select(c.columns).where(c.device == device)
    columns = database.read_now(lambda conn: list(conn.execute(query).scalars()))
    numbers = sorted(record.seq for each in columns for record in explode(bytes(each)))
    assert numbers == list(range(1, BATCHES * SIZE + 1))
    assert ranges_of(numbers) == received.here
    figures = database.read_now(lambda conn: tables.read_figures(conn, "digits", since_minute=0, devices=[device]))
    assert [(one.answered, one.latency.count) for one in figures] == [(BATCHES * SIZE, BATCHES * SIZE)]
