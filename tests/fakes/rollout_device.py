"""Devices of a real hub that only obey: they say that they run what they are assigned, and how it answers there.

No agent and no model: an assignment is committed as soon as it arrives. Batches are sent until the hub acknowledges
them, so a hub that is killed loses nothing.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
import time
from collections.abc import Mapping
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from shared.ids import DeviceId
from shared.telemetry import BatchId, Outcome, Record, RecordClass, Result
from shared.wire import topics
from shared.wire.columns import encode_columns
from shared.wire.envelope import Envelope, decode_envelope, encode_envelope
from shared.wire.messages import (
    KIND_OF,
    Ack,
    Assign,
    Batch,
    Birth,
    Message,
    Reported,
    RunningModel,
    encode_body,
    expect,
)
from tests.fakes.hub_process import Device

ANSWERS = 200
FAMILY = "digits"
NO_MATCHING_SUBSCRIBERS = 0x10
WALL_MS = 1_800_000_000_000


class ObedientDevice:
    """One device; connects at once and again whenever the link is lost.

    Args:
        wrong: of `ANSWERS` answers with each version, how many are wrong.
    """

    def __init__(self, device: Device, *, wrong: Mapping[str, int]) -> None:
        self.name = DeviceId(device.name)
        self.version = ""
        self.ran: list[str] = []
        self._wrong = wrong
        self._epoch = secrets.token_hex(8)
        self._manifest = ""
        self._assignment = 0
        self._session = self._revision = 0
        self._birth_mid = 0
        self._next = {RecordClass.OUTCOME: 1, RecordClass.RESULT: 1}
        self._unsent: dict[BatchId, tuple[Batch, topics.UpLeaf]] = {}
        self._lock = threading.RLock()
        self._client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=device.name, protocol=mqtt.MQTTv5)
        self._client.tls_set_context(device.context())
        self._client.reconnect_delay_set(min_delay=1, max_delay=1)
        self._client.on_connect = self._connected
        self._client.on_message = self._arrived
        self._client.on_publish = self._published
        self._client.connect("localhost", device.port, keepalive=30)
        self._client.loop_start()

    def close(self) -> None:
        """Leave."""
        self._client.disconnect()
        self._client.loop_stop()
        self._client._reset_sockets()

    def _connected(self, client: mqtt.Client, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        if reason.is_failure:
            return
        with self._lock:
            client.subscribe(topics.down_filter(self.name), qos=1)
            self._announce()

    def _announce(self) -> None:
        self._session += 1
        birth = Birth(
            boot=1, epoch=self._epoch, agent_version="0", profile="pi", session=self._session,
            assignment_version=self._assignment, models=self._models(),
        )  # fmt: skip
        self._birth_mid = self._send(birth, "birth")
        self._report()
        for batch, leaf in self._unsent.values():
            self._send(batch, leaf)

    def _published(self, _client: mqtt.Client, _data: Any, mid: int, reason: Any, _properties: Any) -> None:
        # A broker that has just started may know us before it knows the hub, and our birth reaches nobody. An agent
        # mends that with its next heartbeat; tests have no time for one.
        if reason.value != NO_MATCHING_SUBSCRIBERS:
            return
        with self._lock:
            is_birth = mid == self._birth_mid
        if is_birth:
            time.sleep(0.2)
            with self._lock:
                self._announce()

    def _arrived(self, _client: mqtt.Client, _data: Any, message: mqtt.MQTTMessage) -> None:
        with self._lock:
            envelope = decode_envelope(bytes(message.payload))
            if envelope.kind == "ack":
                for verdict in expect(envelope, Ack).verdicts:
                    self._unsent.pop(verdict.batch, None)
            elif envelope.kind == "assign":
                self._obey(json.loads(expect(envelope, Assign).document)["signed"])

    def _obey(self, assignment: dict[str, Any]) -> None:
        if assignment["version"] <= self._assignment:
            return
        self._assignment = assignment["version"]
        (model,) = assignment["models"]
        if model["version"] != self.version:
            self.version, self._manifest = model["version"], model["digest"]
            self.ran.append(self.version)
            self._answer()
        self._report()

    def _answer(self) -> None:
        """What the application asks of a version as soon as it serves, and what it says of the answers."""
        version, wrong = self.version, self._wrong[self.version]
        ids = [f"{self.name}-{version}-{len(self.ran)}-{number}" for number in range(ANSWERS)]
        results = [
            Result(request=name, model=FAMILY, version=version, variant="int8", rung="full", took_us=2000)
            for name in ids
        ]
        outcomes = [
            Outcome(request=name, model=FAMILY, version=version, correct=number >= wrong)
            for number, name in enumerate(ids)
        ]
        self._keep(results, RecordClass.RESULT, "telemetry")
        self._keep(outcomes, RecordClass.OUTCOME, "outcome")

    def _keep(self, bodies: list[Any], klass: RecordClass, leaf: topics.UpLeaf) -> None:
        first = self._next[klass]
        records = [Record(seq=first + n, at_ms=WALL_MS, body=body) for n, body in enumerate(bodies)]
        self._next[klass] = first + len(records)
        columns = encode_columns(records)
        digest = hashlib.sha256(columns).hexdigest()
        name = BatchId(epoch=self._epoch, klass=int(klass), first=first, last=records[-1].seq, digest=digest)
        self._unsent[name] = Batch(batch=name, columns=columns), leaf
        self._send(self._unsent[name][0], leaf)

    def _models(self) -> tuple[RunningModel, ...]:
        if not self.version:
            return ()
        return (RunningModel(family=FAMILY, phase="committed", version=self.version, manifest=self._manifest),)

    def _report(self) -> None:
        self._revision += 1
        self._send(
            Reported(revision=self._revision, assignment_version=self._assignment, models=self._models()), "reported"
        )

    def _send(self, message: Message, leaf: topics.UpLeaf) -> int:
        envelope = Envelope(
            v=1,
            id=secrets.token_hex(8),
            kind=KIND_OF[type(message)],
            device=self.name,
            boot=1,
            wall_ms=WALL_MS,
            mono_ms=1,
            body=encode_body(message),
        )
        return self._client.publish(topics.up(self.name, leaf), encode_envelope(envelope), qos=1).mid
