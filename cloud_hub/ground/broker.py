"""The managed broker: writes mosquitto's configuration, starts it as a child that dies with the hub, restarts it.

What the configuration is made to hold (each fact was tried, see docs):
- A client's name and id are its certificate's common name, so nobody takes over another's session.
- Topics are confined by patterns on that name. A forbidden SUBSCRIBE is granted all the same; what is refused is the
  delivery, and a forbidden publish.
- `set_tcp_nodelay` is off by default and costs thirty times in throughput. mosquitto started by root drops its rights
  before it reads keys, unless `user` says otherwise.
- Who is on the revocation list cannot come in; reading the list again ends no session (access.py does).
- Nothing rests on the broker keeping anything: no persistence.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from cloud_hub.ground import leash, revocation
from cloud_hub.ground.folder import local_user
from cloud_hub.ground.metrics import Metrics
from cloud_hub.ground.tlsport import port_error
from shared import limits
from shared.clock import Clock
from shared.errors import ConfigError, StorageError

logger = logging.getLogger(__name__)

READY_S: Final = 10.0
STOP_S: Final = 3.0
PORT_WAIT_S: Final = 3.0
_POLL_S: Final = 0.05
_BACKOFF_S: Final = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_STEADY_MS: Final = 60_000
MAX_LOG_BYTES: Final = 4 * limits.MIB
LOG_LOOK_S: Final = 10.0
_ELSEWHERE: Final = ("/usr/sbin", "/usr/local/sbin", "/usr/local/bin", "/opt/homebrew/sbin")


@dataclass(frozen=True, slots=True)
class BrokerSettings:
    """Where the broker listens, which program it is, the folder with its files, and whose the whole tree is."""

    folder: Path
    host: str
    port: int
    binary: str
    hub_name: str


def configuration(settings: BrokerSettings, *, user: str | None) -> str:
    """The text of mosquitto.conf; without a user, whose name only root needs, it stays who starts it."""
    folder = settings.folder
    return "\n".join(
        [
            "# Written by outrider-hub at each start; changes are lost.",
            "per_listener_settings false",
            *([f"user {user}"] if user else []),
            f"listener {settings.port} {settings.host}",
            f"cafile {folder / 'ca.pem'}",
            f"capath {folder / 'cas'}",
            f"certfile {folder / 'server.pem'}",
            f"keyfile {folder / 'server.key'}",
            f"crlfile {folder / revocation.LIST_NAME}",
            "tls_version tlsv1.3",
            "require_certificate true",
            "use_identity_as_username true",
            "use_username_as_clientid true",
            "allow_anonymous false",
            f"acl_file {folder / revocation.ACCESS_NAME}",
            "set_tcp_nodelay true",
            f"max_packet_size {limits.MAX_MQTT_PACKET_BYTES}",
            "max_inflight_messages 1000",
            "max_queued_messages 10000",
            "persistence false",
            "sys_interval 0",
            "log_dest stdout",
            "log_type error",
            "log_type warning",
            "log_type notice",
            "",
        ]
    )


def write_files(settings: BrokerSettings) -> None:
    """Write mosquitto.conf, and an access list where there is none; mosquitto wants neither to be writable by others.

    Which devices are denied is for the hub to write (revocation.py), before each start.
    """
    _replace(settings.folder / "mosquitto.conf", configuration(settings, user=local_user()))
    access = settings.folder / revocation.ACCESS_NAME
    if not access.is_file():
        _replace(access, revocation.access_list(settings.hub_name))


def _replace(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.new")
    draft.touch(mode=0o600, exist_ok=True)
    draft.write_text(text)
    draft.replace(path)


def find_binary(name: str) -> str:
    """The program's path; raises ConfigError with what to install when there is none."""
    for candidate in (shutil.which(name), *(shutil.which(name, path=folder) for folder in _ELSEWHERE)):
        if candidate:
            return candidate
    raise ConfigError(
        f"the broker {name!r} is not installed",
        code="config.broker_missing",
        hint='run `apt-get install mosquitto`, set broker.binary to its path, or use broker.mode = "external"',
    )


async def require_free_port(settings: BrokerSettings) -> None:
    """Raise ConfigError when the broker's port is taken; waits a moment for a broker that is just dying."""
    async with asyncio.timeout(PORT_WAIT_S * 2):
        for attempt in range(int(PORT_WAIT_S / _POLL_S)):
            error = _try_port(settings)
            if error is None:
                return
            if attempt == int(PORT_WAIT_S / _POLL_S) - 1:
                raise port_error(error, host=settings.host, port=settings.port, key="broker.port") from error
            await asyncio.sleep(_POLL_S)


class Broker:
    """The broker's process and its supervision."""

    def __init__(self, settings: BrokerSettings, *, metrics: Metrics, clock: Clock) -> None:
        self._settings = settings
        self._metrics = metrics
        self._clock = clock
        self._log_path = settings.folder / "mosquitto.log"
        self._log_began = 0
        self._process: asyncio.subprocess.Process | None = None
        self._is_restarting = False

    def reload(self) -> None:
        """Let it read its certificates and access list again (SIGHUP, mosquitto(8)); live sessions stay."""
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGHUP)

    def restart(self) -> None:
        """End it and start another at once: what it must forget it only forgets that way. Sessions come back."""
        if self._process is not None and self._process.returncode is None:
            self._is_restarting = True
            self._process.send_signal(signal.SIGTERM)

    async def run(self, *, ready: asyncio.Event) -> None:
        """Keep a broker running until cancelled; sets `ready` when it first answers.

        Raises:
            ConfigError: it does not start at all. Later ends are met with restarts, further and further apart.
        """
        binary = find_binary(self._settings.binary)
        write_files(self._settings)
        failures = 0
        while True:
            began_ms = self._clock.mono_ms()
            process = self._process = await self._start(binary)
            try:
                if await self._answers(process):
                    if ready.is_set():
                        logger.info("broker is back")
                    ready.set()
                elif not ready.is_set():
                    raise ConfigError(
                        f"the broker {binary} does not start: {self._last_words(process.returncode)}",
                        code="config.broker_failed",
                        hint=f"see {self._log_path}, and check that broker.binary names a mosquitto",
                    )
                await self._attend(process)
            finally:
                await _end(process)
            if self._is_restarting:
                self._is_restarting = False
                logger.info("broker is started anew")
                continue
            failures = 0 if self._clock.mono_ms() - began_ms > _STEADY_MS else failures + 1
            pause_s = _BACKOFF_S[min(failures, len(_BACKOFF_S)) - 1] if failures else _BACKOFF_S[0]
            logger.error("broker ended with status %s, next start in %s s", process.returncode, pause_s)
            self._metrics.broker_restarts.inc()
            await asyncio.sleep(pause_s)

    async def _start(self, binary: str) -> asyncio.subprocess.Process:
        assert leash.__file__ is not None
        with self._open_log() as log:
            return await asyncio.create_subprocess_exec(
                sys.executable,
                "-I",
                "-S",
                leash.__file__,
                str(os.getpid()),
                binary,
                "-c",
                str(self._settings.folder / "mosquitto.conf"),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Away from the terminal: Ctrl-C is for the hub, which then ends its broker in order.
                start_new_session=True,
                # Without our environment: mosquitto would tell the service manager that *it* is ready.
                env={},
            )

    async def _attend(self, process: asyncio.subprocess.Process) -> None:
        """Wait for its end, and meanwhile for its log: whoever reaches the port can make it write."""
        while True:
            try:
                async with asyncio.timeout(LOG_LOOK_S):
                    await process.wait()
                return
            except TimeoutError:
                await asyncio.to_thread(trim_log, self._log_path)

    def _open_log(self) -> IO[bytes]:
        trim_log(self._log_path)
        try:
            log = self._log_path.open("ab")
            self._log_began = log.seek(0, os.SEEK_END)
            return log
        except OSError as error:
            raise StorageError(f"{self._log_path} cannot be written: {error.strerror}") from error

    async def _answers(self, process: asyncio.subprocess.Process) -> bool:
        """Whether it accepts connections before it ends or the deadline passes."""
        host = local_address(self._settings.host)
        deadline_ms = self._clock.mono_ms() + int(READY_S * 1000)
        while process.returncode is None and self._clock.mono_ms() < deadline_ms:
            try:
                _, writer = await asyncio.wait_for(asyncio.open_connection(host, self._settings.port), 1.0)
            except (OSError, TimeoutError):
                await asyncio.sleep(_POLL_S)
                continue
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
            return True
        return False

    def _last_words(self, status: int | None) -> str:
        """The last line that this process wrote; what stands before it in the log is of others."""
        try:
            with self._log_path.open("rb") as log:
                log.seek(max(self._log_began, log.seek(0, os.SEEK_END) - 4096))
                lines = log.read(4096).decode(errors="replace").strip().splitlines()
        except OSError:
            lines = []
        if lines:
            return lines[-1]
        return "it does not answer and says nothing" if status is None else f"it ended with status {status}, silently"


def trim_log(path: Path) -> None:
    """Move the end of a log that has grown too long to `.1`, and empty it in place: its writer appends and goes on."""
    try:
        with path.open("rb+") as log:
            length = log.seek(0, os.SEEK_END)
            if length <= MAX_LOG_BYTES:
                return
            log.seek(length - MAX_LOG_BYTES)
            path.with_suffix(f"{path.suffix}.1").write_bytes(log.read(MAX_LOG_BYTES))
            log.truncate(0)
    except FileNotFoundError:
        return
    except OSError as error:
        logger.warning("%s was not shortened: %s", path, error.strerror)


def local_address(host: str) -> str:
    """The address at which this machine reaches a listener on `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)  # noqa: S104 - compared, not bound


def _try_port(settings: BrokerSettings) -> OSError | None:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            return error
    return None


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        await asyncio.wait_for(process.wait(), STOP_S)
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
