"""How much telemetry a hub takes: through mosquitto, into SQLite, committed before it is acknowledged.

Fifty devices send batches of a hundred readings and keep a few on the way each. The hub is a process of its own with
the product's parts: courier, switchboard, desk, database (WAL, `synchronous=FULL`). Devices are played by this process.
Hub and broker speak TLS, as they do in the field; devices come in without, because their share of it is not the hub's.

`records_per_s`: readings stored and acknowledged a second. `vs_bare_consumer`: that, as a share of what a consumer of
the same client library with the same subscription gets that stores nothing, in the same run. `ack_p99_ms`: from sending
a batch to its acknowledgement, 99th percentile, with all devices' windows full. A run after which a record is not
stored, or is stored twice, gives no figures.
"""

from __future__ import annotations

import contextlib
import sqlite3
import statistics
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from cloud_hub.ground.broker import find_binary
from shared.ids import DeviceId
from shared.wire import topics
from tests.bench import _ingest_bare
from tests.bench._ingest_load import RECORDS, Run, Sender, paced_by_answers, paced_by_progress, packets
from tests.fakes.ingest_place import IngestPlace, ingest_place

DEVICES = 50
BATCHES = 600
"""Of each device in a run."""
WINDOW = 4
ROUNDS = 2
HUB = "hub"


def run() -> dict[str, float]:
    """Measure; takes about a minute."""
    names = [DeviceId(f"dev-{number}") for number in range(DEVICES)]
    sent = {name: packets(name, BATCHES) for name in names}
    print(f"ingest: {DEVICES * BATCHES} batches made", file=sys.stderr)
    hub_runs, bare_rates = [], []
    for number in range(ROUNDS):
        bare_rates.append(bare(sent))
        hub_runs.append(hub(sent))
        rates = f"{_rate(hub_runs[-1]):,.0f} records/s stored, {bare_rates[-1]:,.0f} had by a bare consumer"
        print(f"ingest: round {number + 1}: {rates}", file=sys.stderr)
    stored = statistics.median(_rate(one) for one in hub_runs)
    waits = sorted(wait for one in hub_runs for wait in one.waits_s)
    return {
        "records_per_s": stored,
        "vs_bare_consumer": stored / statistics.median(bare_rates),
        "ack_p99_ms": 1000 * waits[int(0.99 * len(waits))],
        "ack_p50_ms": 1000 * waits[len(waits) // 2],
        "bare_records_per_s": statistics.median(bare_rates),
    }


def hub(sent: dict[DeviceId, list[bytes]]) -> Run:
    """All batches into a new hub."""
    with ingest_place(find_binary("mosquitto"), hubs=[HUB]) as place:
        place.hub(HUB, f"sqlite:///{place.folder / 'hub.db'}")
        with _senders(place, sent) as senders:
            found = paced_by_answers(senders, window=WINDOW)
        check(place.folder / "hub.db", {name: len(made) * RECORDS for name, made in sent.items()})
        return found


def check(file: Path, sent: Mapping[DeviceId, int]) -> None:
    """Raise RuntimeError unless each device's records, numbered from 1 to so many, are stored once and none other."""
    with contextlib.closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as database:
        rows = dict(database.execute("SELECT device, sum(records) FROM telemetry_batches GROUP BY device"))
        streams = database.execute("SELECT device, ranges, lost, records FROM telemetry_streams").fetchall()
    known = {device: (msgspec.msgpack.decode(here), msgspec.msgpack.decode(lost), many)
             for device, here, lost, many in streams}  # fmt: skip
    wanted: dict[str, tuple[object, ...]] = {device: ([[1, many]], [], many) for device, many in sent.items()}
    wrong = [device for device, many in sent.items() if (rows.get(device), known.get(device)) != (many, wanted[device])]
    if wrong or len(streams) != len(sent) or len(rows) != len(sent):
        raise RuntimeError(f"not all that was acknowledged is stored once: {wrong[:5] or sorted(known)}")


def bare(sent: dict[DeviceId, list[bytes]]) -> float:
    """Records a second that a bare consumer gets."""
    with ingest_place(find_binary("mosquitto"), hubs=[HUB]) as place:
        place.child("tests.bench._ingest_bare", HUB, str(place.hub_port))
        listener = Sender(DeviceId("listener"), place.device_port, [], listen=_ingest_bare.PROGRESS)
        with contextlib.closing(listener.socket), _senders(place, sent) as senders:
            return _rate(paced_by_progress(senders, listener, window=WINDOW, batches=DEVICES * BATCHES))


@contextlib.contextmanager
def _senders(place: IngestPlace, sent: dict[DeviceId, list[bytes]]) -> Iterator[list[Sender]]:
    senders = [Sender(name, place.device_port, made, listen=topics.down_filter(name)) for name, made in sent.items()]
    try:
        yield senders
    finally:
        for sender in senders:
            sender.socket.close()


def _rate(run: Run) -> float:
    return run.batches * RECORDS / run.seconds


if __name__ == "__main__":
    for key, value in run().items():
        print(f"{key:24} {value:,.4g}")
