"""A real hub: its own process, its own mosquitto, and devices that enrol and speak MQTT with real certificates."""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt
from cryptography.hazmat.primitives.asymmetric import ec
from paho.mqtt.enums import CallbackAPIVersion

from tests.fakes.hub_parts import csr_for, key_pem

WAIT_S = 20.0


def wait_until(holds: Callable[[], bool], what: str, *, within_s: float = WAIT_S) -> None:
    """Look again and again until it holds; fails after the deadline."""
    deadline = time.monotonic() + within_s
    while not holds():
        if time.monotonic() > deadline:
            raise AssertionError(f"still waiting after {within_s} s: {what}")
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def run_command(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """One `outrider-hub` command, to its end."""
    return subprocess.run(
        [sys.executable, "-m", "cloud_hub", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **(env or {})},
    )


@dataclass(frozen=True, slots=True)
class Answer:
    """What the hub said over HTTPS."""

    status: int
    body: Any


class HubProcess:
    """A hub in a directory."""

    def __init__(self, folder: Path, *, port: int, broker_port: int) -> None:
        self.folder = folder
        self.data = folder / "data"
        self.port, self.broker_port = port, broker_port
        self.process: subprocess.Popen[str] | None = None
        self.reader: threading.Thread | None = None
        self.lines: list[str] = []

    def init(self) -> None:
        """Make it."""
        done = run_command(
            "init", "--data", str(self.data), "--offline", str(self.folder / "offline"), "--port", str(self.port),
            "--broker-port", str(self.broker_port), "--token-file", str(self.folder / "token"),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    def start(self, *, env: dict[str, str] | None = None) -> str:
        """Start it and return its readiness line."""
        self.lines = []
        with (self.folder / "hub.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "cloud_hub", "serve", "--data", str(self.data)],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **(env or {})},
            )
        self.process = process
        assert process.stdout is not None
        stdout = process.stdout

        def read() -> None:
            for line in stdout:
                self.lines.append(line.strip())

        self.reader = threading.Thread(target=read, daemon=True)
        self.reader.start()
        wait_until(lambda: bool(self.lines) or process.poll() is not None, "the readiness line")
        assert self.lines, self.log
        return self.lines[0]

    @property
    def log(self) -> str:
        """What it logged."""
        return (self.folder / "hub.log").read_text()

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self.process is not None
        return self.process.pid

    def broker_pids(self) -> list[int]:
        """Processes that run with this hub's mosquitto.conf."""
        wanted = str(self.data / "broker" / "mosquitto.conf").encode()
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                command = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if wanted in command and is_alive(int(entry.name)):
                found.append(int(entry.name))
        return found

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it and return its exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            status = self.process.wait(timeout=WAIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        self.release()
        wait_until(lambda: not self.broker_pids(), "the broker's end")
        return status

    def release(self) -> None:
        """Close the pipe of a process that has ended."""
        if self.reader is not None and self.process is not None and self.process.stdout is not None:
            self.reader.join(WAIT_S)
            self.process.stdout.close()

    def context(self) -> ssl.SSLContext:
        """TLS that trusts this hub's CA only."""
        return ssl.create_default_context(cafile=str(self.data / "ca" / "ca.pem"))

    def call(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        token: str | None = None,
        context: ssl.SSLContext | None = None,
        headers: dict[str, str] | None = None,
    ) -> Answer:
        """One request over HTTPS."""
        request = urllib.request.Request(f"https://localhost:{self.port}{path}", method=method)
        for name, value in (headers or {}).items():
            request.add_header(name, value)
        if token is not None:
            request.add_header("Authorization", f"Bearer {token}")
        data = None
        if body is not None:
            data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, data, timeout=WAIT_S, context=context or self.context()) as response:
                return Answer(response.status, _parsed(response.read()))
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, _parsed(error.read()))

    @property
    def admin(self) -> str:
        """The first operator's token."""
        return (self.folder / "token").read_text().strip()

    def operate(self, *arguments: str) -> str:
        """One `outrider` command of a person who is logged in on this machine, to its end; what it printed."""
        done = subprocess.run(
            [sys.executable, "-m", "cloud_hub.cli", *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={**os.environ, "OUTRIDER_CONFIG": str(self.folder / "contexts.json")},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def publish(self, release: str) -> None:
        """Sign a built release with the offline keys and publish it; nobody is told to run it."""
        ca = str(self.data / "ca" / "ca.pem")
        self.operate("login", f"https://localhost:{self.port}", "--token-file", str(self.folder / "token"), "--ca", ca)
        bundle = str(self.folder / f"{release.replace('/', '-')}.json")
        keys = str(self.folder / "offline")
        self.operate("release", "sign", release, "--keys", keys, "--out", bundle, "--yes")
        self.operate("release", "publish", bundle)

    def join_token(self, *arguments: str) -> str:
        """A join token, made by the command while the hub runs or not."""
        done = run_command("token", "create", "--data", str(self.data), "--kind", "join", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def enrol(self, name: str) -> Device:
        """A device with a certificate of this hub."""
        key = ec.generate_private_key(ec.SECP256R1())
        body = {"token": self.join_token(), "csr_pem": csr_for(key), "profile": "pi", "name": name}
        answer = self.call("POST", "/v1/enroll", body)
        assert answer.status == 201, answer
        folder = self.folder / name
        folder.mkdir()
        (folder / "device.key").write_bytes(key_pem(key))
        (folder / "device.pem").write_text(answer.body["certificate_pem"])
        (folder / "ca.pem").write_text(answer.body["ca_pem"])
        return Device(name=name, folder=folder, port=answer.body["broker"]["port"])

    def device(self, name: str) -> dict[str, Any]:
        """What the hub knows of a device."""
        answer = self.call("GET", f"/v1/devices/{name}", token=self.admin)
        assert answer.status == 200, answer
        known: dict[str, Any] = answer.body
        return known

    def messages(self, leaf: str) -> dict[str, float]:
        """Messages by outcome, from /metrics."""
        text = str(self.call("GET", "/metrics", token=self.admin).body)
        found = {}
        for line in text.splitlines():
            if line.startswith("outrider_hub_messages_total{") and f'leaf="{leaf}"' in line:
                found[line.split('outcome="')[1].split('"')[0]] = float(line.rsplit(" ", 1)[1])
        return found


@dataclass(frozen=True, slots=True)
class Device:
    """A device's certificate, key and CA on disk."""

    name: str
    folder: Path
    port: int

    def context(self) -> ssl.SSLContext:
        """TLS with the device's certificate."""
        context = ssl.create_default_context(cafile=str(self.folder / "ca.pem"))
        context.load_cert_chain(self.folder / "device.pem", self.folder / "device.key")
        return context


class _ClosedWhenRefused(ssl.SSLSocket):
    """The client forgets a socket whose handshake failed, which the tests' warnings would tell as a leak."""

    def do_handshake(self, block: bool = False) -> None:
        try:
            super().do_handshake(block)
        except OSError:
            self.close()
            raise


class Line:
    """An MQTT connection of a device that notes what happens to it. Does not connect again by itself."""

    def __init__(
        self,
        device: Device,
        *,
        client_id: str | None = None,
        context: ssl.SSLContext | None = None,
        will: tuple[str, bytes] | None = None,
    ) -> None:
        self.received: queue.Queue[tuple[str, bytes]] = queue.Queue()
        self.connected = threading.Event()
        self.lost = threading.Event()
        self.granted: queue.Queue[list[int]] = queue.Queue()
        self.acked: queue.Queue[tuple[int, int]] = queue.Queue()
        self.client = mqtt.Client(
            CallbackAPIVersion.VERSION2,
            client_id=device.name if client_id is None else client_id,
            protocol=mqtt.MQTTv5,
            reconnect_on_failure=False,
        )
        context = context or device.context()
        context.sslsocket_class = _ClosedWhenRefused
        self.client.tls_set_context(context)
        self.client.on_connect = self._on_connect
        self.client.on_disconnect = lambda *_: self.lost.set()
        self.client.on_message = lambda _c, _u, message: self.received.put((message.topic, bytes(message.payload)))
        self.client.on_subscribe = lambda _c, _u, _m, reasons, _p: self.granted.put([code.value for code in reasons])
        self.client.on_publish = lambda _c, _u, mid, reason, _p: self.acked.put((mid, reason.value))
        if will is not None:
            self.client.will_set(*will, qos=1)
        try:
            self.client.connect("localhost", device.port, keepalive=30)
        except OSError:
            self._end()
            raise
        self.client.loop_start()

    def _on_connect(self, _client: mqtt.Client, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        if not reason.is_failure:
            self.connected.set()

    def publish(self, topic: str, payload: bytes) -> int:
        """Publish, wait for the broker's answer and return its reason code."""
        mid = self.client.publish(topic, payload, qos=1).mid
        while True:
            answered, reason = self.acked.get(timeout=WAIT_S)
            if answered == mid:
                return reason

    def subscribe(self, *filters: str) -> None:
        """Subscribe and wait until the broker has answered."""
        for name in filters:
            self.client.subscribe(name, qos=1)
            self.granted.get(timeout=WAIT_S)

    def drain(self) -> list[tuple[str, bytes]]:
        """Everything that has come in so far."""
        found = []
        while not self.received.empty():
            found.append(self.received.get_nowait())
        return found

    def close(self) -> None:
        """Leave in order."""
        self.client.disconnect()
        self._end()

    def _end(self) -> None:
        self.client.loop_stop()
        # The client frees its wake-up sockets when it is collected, which the tests' warnings would tell as a leak.
        self.client._reset_sockets()

    def abandon(self) -> None:
        """Give up a connection that the broker has ended or refused."""
        self._end()

    def cut(self) -> None:
        """Lose the connection without a word, so that the last will is sent."""
        sock = self.client.socket()
        assert sock is not None
        raw = socket.socket(fileno=os.dup(sock.fileno()))
        raw.shutdown(socket.SHUT_RDWR)
        raw.close()
        self._end()


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return data.decode()
