"""Devices of a real hub that only learn: a certificate, an MQTT line, Flower's format through the codec, no agent.

Each says that it serves a release, and answers round tasks by a function; what is too large for a message goes over
HTTPS, as a device's does. Answers are kept, so that a task said again is answered again and not learned twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from shared.errors import OutriderError
from shared.ids import DeviceId
from shared.wire import topics
from shared.wire.envelope import Envelope, decode_envelope, encode_envelope
from shared.wire.messages import (
    KIND_OF,
    Birth,
    Message,
    Reported,
    RoundReply,
    RoundTask,
    RunningModel,
    encode_body,
    expect,
)
from tests.fakes.hub_process import Device

INLINE_BYTES = 192 * 1024
NO_MATCHING_SUBSCRIBERS = 0x10


class LightDevice:
    """One device; connects at once and again whenever the link is lost."""

    def __init__(
        self, device: Device, *, hub_port: int, family: str, version: str, answer: Callable[[bytes], bytes]
    ) -> None:
        self.name = DeviceId(device.name)
        self.tasks = 0
        self.learned = 0
        self._answer = answer
        self._port = hub_port
        self._context = device.context()
        self._model = RunningModel(family=family, phase="committed", version=version)
        self._session = 0
        self._kept: dict[str, bytes] = {}
        self._lock = threading.Lock()
        self._https: http.client.HTTPSConnection | None = None
        self._client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=device.name, protocol=mqtt.MQTTv5)
        self._client.tls_set_context(self._context)
        self._client.reconnect_delay_set(min_delay=1, max_delay=1)
        self._client.on_connect = self._connected
        self._client.on_message = self._arrived
        self._client.on_publish = self._published
        self._birth_mid = 0
        self._client.connect("localhost", device.port, keepalive=30)
        self._client.loop_start()

    def close(self) -> None:
        """Leave."""
        self._client.disconnect()
        self._client.loop_stop()
        self._client._reset_sockets()
        if self._https is not None:
            self._https.close()

    def _connected(self, client: mqtt.Client, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        if reason.is_failure:
            return
        client.subscribe(topics.down_filter(self.name), qos=1)
        self._announce()

    def _announce(self) -> None:
        self._session += 1
        birth = Birth(boot=1, epoch="e1", agent_version="0", profile="pi", models=(self._model,), session=self._session)
        self._birth_mid = self._send(birth, "birth")
        report = Reported(revision=self._session, assignment_version=0, models=(self._model,))
        self._send(report, "reported")

    def _published(self, _client: mqtt.Client, _data: Any, mid: int, reason: Any, _properties: Any) -> None:
        # A broker that has just started may know us before it knows the hub, and our birth reaches nobody. An agent
        # mends that with its next heartbeat; tests have no time for one.
        if mid == self._birth_mid and reason.value == NO_MATCHING_SUBSCRIBERS:
            time.sleep(0.2)
            self._announce()

    def _arrived(self, _client: mqtt.Client, _data: Any, message: mqtt.MQTTMessage) -> None:
        if not message.topic.endswith("/down/round"):
            return
        task = expect(decode_envelope(bytes(message.payload)), RoundTask)
        self.tasks += 1
        # The hub may be gone at any moment of this; it says the task again.
        with contextlib.suppress(OSError, http.client.HTTPException, OutriderError):
            self._reply(task)

    def _reply(self, task: RoundTask) -> None:
        said = self._kept.get(task.message)
        if said is None:
            content = task.content or self._request("GET", f"/v1/blobs/{task.blob}")
            said = self._answer(content)
            self.learned += 1
            self._kept = {task.message: said}
        if len(said) <= INLINE_BYTES:
            self._send(RoundReply(run=task.run, message=task.message, content=said), "round")
            return
        self._request("PUT", f"/v1/rounds/{task.run}/replies/{task.message}", said)
        digest = hashlib.sha256(said).hexdigest()
        self._send(RoundReply(run=task.run, message=task.message, blob=digest, length=len(said)), "round")

    def _request(self, method: str, path: str, body: bytes | None = None) -> bytes:
        if self._https is None:
            self._https = http.client.HTTPSConnection("localhost", self._port, timeout=20, context=self._context)
        try:
            self._https.request(method, path, body=body)
            response = self._https.getresponse()
            data = response.read()
        except (OSError, http.client.HTTPException):
            self._https.close()
            self._https = None
            raise
        if response.status >= 300:
            raise OutriderError(f"{method} {path}: {response.status} {data[:300]!r}")
        return data

    def _send(self, message: Message, leaf: topics.UpLeaf) -> int:
        envelope = Envelope(
            v=1,
            id=secrets.token_hex(8),
            kind=KIND_OF[type(message)],
            device=self.name,
            boot=1,
            wall_ms=1_800_000_000_000,
            mono_ms=1,
            body=encode_body(message),
        )
        return self._client.publish(topics.up(self.name, leaf), encode_envelope(envelope), qos=1).mid
