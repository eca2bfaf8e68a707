"""`Verifier` in a child process: starts it, fetches what it asks for, keeps what it accepted, and ends it.

    trust/root.json              the newest root; the first one comes with the enrolment
    trust/<role>.json            accepted metadata, the role's name percent-encoded
    trust/assignment             the assignment document accepted last (no role's file is called that)

Rules: a file is written aside, synced, renamed, and the directory synced; when the root has replaced keys, what the
old ones signed is removed before the new root is written; losing any of these files but the root costs a download and
nothing else, because the floors are kept elsewhere, so a disk that refuses to keep one does not stop a verification.

This module loads neither tuf nor cryptography: what others sent is only looked into by the child.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Final
from urllib.parse import quote, unquote

from edge_agent.framing import FrameReader, build_frame
from edge_agent.update_ports import Fetcher
from shared import limits
from shared.errors import (
    OutriderError,
    ProtocolViolation,
    StorageError,
    TransferCorrupt,
    TransferRefused,
    TrustError,
    Unreachable,
)
from shared.ids import DeviceId, Digest
from shared.model import FileRef
from shared.release import Floors, VerifiedAssignment
from shared.wire.verification import (
    Accepted,
    Fed,
    FromVerifier,
    Job,
    Keep,
    Need,
    Refused,
    ToVerifier,
    decode_from_verifier,
    encode,
)

logger = logging.getLogger(__name__)

DEADLINE_MS: Final = 120_000
MAX_CACHE_BYTES: Final = limits.MAX_FRAME_PAYLOAD_BYTES - 8 * limits.MIB
"""What of the cache is handed to a verification; the rest of a frame is for the job itself."""

_ROOT: Final = "root"
_SUFFIX: Final = ".json"
_REAP_S: Final = 5.0


class TrustFolder:
    """The trust directory. Blocking; small files."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def root(self) -> bytes:
        """The newest trusted root; raises TrustError `trust.no_root` before the enrolment."""
        try:
            return self._read(self._path(_ROOT), limits.MAX_ROOT_BYTES)
        except OSError as error:
            raise TrustError(
                f"there is no trusted root in {self._directory}",
                code="trust.no_root",
                hint="enrol this device: outrider-agent enroll TOKEN",
            ) from error

    def cache(self) -> dict[str, bytes]:
        """Accepted metadata by role, as far as it can be read and fits into a job."""
        found: dict[str, bytes] = {}
        room = MAX_CACHE_BYTES
        for path in sorted(self._directory.glob(f"*{_SUFFIX}")):
            role = unquote(path.name.removesuffix(_SUFFIX))
            if role == _ROOT or path.is_symlink():
                continue
            with contextlib.suppress(OSError):
                data = self._read(path, limits.MAX_TARGETS_BYTES)
                if len(data) <= room:
                    found[role] = data
                    room -= len(data)
        return found

    def previous(self) -> bytes | None:
        """The assignment document accepted last, if it is still there."""
        try:
            return self._read(self._directory / "assignment", limits.MAX_ASSIGNMENT_BYTES)
        except OSError:
            return None

    def keep(self, step: Keep) -> None:
        """Remove what the step drops, then write what it keeps; a disk that refuses is logged and no error."""
        try:
            for role in step.drops:
                self._path(role).unlink(missing_ok=True)
            self._write(self._path(step.role), step.data)
        except OSError as error:
            logger.warning("accepted metadata could not be kept", extra={"role": step.role, "reason": error.strerror})

    def keep_assignment(self, document: bytes) -> None:
        """The same for the accepted assignment."""
        try:
            self._write(self._directory / "assignment", document)
        except OSError as error:
            logger.warning("the accepted assignment could not be kept", extra={"reason": error.strerror})

    def _path(self, role: str) -> Path:
        return self._directory / f"{quote(role, safe='')}{_SUFFIX}"

    def _read(self, path: Path, max_bytes: int) -> bytes:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise OSError(f"{path.name} is larger than {max_bytes} bytes")
        return data

    def _write(self, path: Path, data: bytes) -> None:
        # A name that no role's file can have; one verification at a time, so one name is enough.
        aside = self._directory / ".new"
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


class PassingShelf:
    """A `Shelf` in memory for one small file on its way to the verifier, which is who checks it."""

    def __init__(self, file: FileRef) -> None:
        self._file = file
        self._data = bytearray()

    def taken(self) -> bytes:
        """What arrived."""
        return bytes(self._data)

    def has(self, digest: Digest) -> bool:  # noqa: ARG002
        """Never: each file passes through once."""
        return False

    def resume_at(self, digest: Digest) -> int:  # noqa: ARG002
        """How many bytes have arrived."""
        return len(self._data)

    def append(self, digest: Digest, data: bytes, *, offset: int) -> None:  # noqa: ARG002
        """Hold these bytes; raises TransferCorrupt for more than were promised."""
        if offset + len(data) > self._file.length:
            raise TransferCorrupt(f"{self._file.path} is longer than promised", code="transfer.too_large")
        self._data[offset:] = data

    def publish(self, file: FileRef) -> None:
        """Nothing to do: the verifier hashes it."""

    def open(self, file: FileRef) -> int:
        """Raises StorageError: there is no file behind it."""
        raise StorageError(f"{file.path} is only held in memory")

    def drop(self, digest: Digest) -> None:  # noqa: ARG002
        """Let go of it."""
        self._data.clear()

    def collect(self, keep: frozenset[Digest]) -> int:  # noqa: ARG002
        """Let go of it."""
        freed = len(self._data)
        self._data.clear()
        return freed

    def free_bytes(self) -> int:
        """As much as the file may have."""
        return self._file.length


class LiveVerifier:
    """`Verifier`: one child process for each verification, one verification at a time."""

    def __init__(
        self,
        *,
        trust_dir: Path,
        device: DeviceId,
        fetcher: Fetcher,
        deadline_ms: int = DEADLINE_MS,
        command: tuple[str, ...] = (sys.executable, "-I", "-m", "edge_agent.verifier"),
    ) -> None:
        """
        Args:
            trust_dir: `<state>/trust`, holding root.json.
            device: the name on this device's certificate.
            fetcher: how to reach the hub.
            deadline_ms: for a whole verification, its downloads included.
            command: starts the child; our process id is appended.
        """
        self._folder = TrustFolder(trust_dir)
        self._device = device
        self._fetcher = fetcher
        self._deadline_ms = deadline_ms
        self._command = command
        self._turn = asyncio.Lock()

    async def verify(self, document: bytes, *, floors: Floors, wall_ms: int) -> VerifiedAssignment:
        """The verified assignment.

        Raises:
            TrustError: with the attack's name; `trust.verifier_lost` when the child ended without a verdict.
            TransferError: a file could not be had; `transfer.deadline` when time ran out.
            OutriderError: `verifier.start` when the system starts no child.
        """
        if len(document) > limits.MAX_ASSIGNMENT_BYTES:
            raise TrustError(f"an assignment of {len(document)} bytes is too large", code="trust.endless_data")
        async with self._turn:
            try:
                async with asyncio.timeout(self._deadline_ms / 1000):
                    return await self._run(document, floors=floors, wall_ms=wall_ms)
            except TimeoutError as error:
                raise Unreachable(
                    f"the verification was not done within {self._deadline_ms} ms",
                    code="transfer.deadline",
                    hint="look at the link to the hub; the agent tries again by itself",
                ) from error

    async def _run(self, document: bytes, *, floors: Floors, wall_ms: int) -> VerifiedAssignment:
        job = await asyncio.to_thread(self._job, document, floors, wall_ms)
        child = _Child(self._command)
        try:
            await child.send(job)
            del job
            while True:
                match await child.receive():
                    case Need() as need:
                        await child.send(Fed(data=await self._fetch(need)))
                    case Keep() as step:
                        await asyncio.to_thread(self._folder.keep, step)
                        await child.send(Fed())
                    case Accepted(verified=verified):
                        await asyncio.to_thread(self._folder.keep_assignment, document)
                        return verified
                    case Refused(code=code, message=message, hint=hint):
                        kind = TransferRefused if code.startswith("transfer.") else TrustError
                        raise kind(message, code=code, hint=hint)
        finally:
            await child.end()

    def _job(self, document: bytes, floors: Floors, wall_ms: int) -> Job:
        return Job(
            document=document,
            device=self._device,
            root=self._folder.root(),
            cache=self._folder.cache(),
            previous=self._folder.previous(),
            floors=floors,
            wall_ms=wall_ms,
        )

    async def _fetch(self, need: Need) -> bytes | None:
        try:
            if need.file is None:
                return await self._fetcher.metadata(need.name, max_bytes=need.max_bytes)
            shelf = PassingShelf(need.file)
            await self._fetcher.blob(need.file, shelf)
            return shelf.taken()
        except TransferCorrupt as error:
            if error.code != "transfer.too_large":
                raise
            raise TrustError(
                f"{need.name} is longer than the {need.max_bytes} bytes that may be",
                code="trust.endless_data",
                hint="something between the hub and this device sends more than was signed",
            ) from error


class _Child:
    """The verifier process and our end of its socket pair."""

    def __init__(self, command: tuple[str, ...]) -> None:
        self._reader = FrameReader()
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._ours.setblocking(False)
        with theirs:
            try:
                self._process: subprocess.Popen[bytes] = subprocess.Popen(
                    [*command, str(os.getpid())],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    cwd="/",
                    env={"LC_ALL": "C.UTF-8"},
                )
            except OSError as error:
                self._ours.close()
                # No word on what was to be verified: the same document is tried again later.
                raise OutriderError(
                    f"the verifier cannot be started: {error}",
                    code="verifier.start",
                    hint=f"check that {command[0]} runs and that memory is left",
                ) from error

    async def send(self, message: ToVerifier) -> None:
        """Send one message; a child that is gone is noticed by `receive`."""
        loop = asyncio.get_running_loop()
        with contextlib.suppress(ConnectionError):
            for part in build_frame(b"", [encode(message)]):
                await loop.sock_sendall(self._ours, part)

    async def receive(self) -> FromVerifier:
        """Wait for one message; raises TrustError `trust.verifier_lost` when none will come."""
        loop = asyncio.get_running_loop()
        try:
            while (frame := self._reader.next_frame()) is None:
                count = await loop.sock_recv_into(self._ours, self._reader.buffer())
                if count == 0:
                    raise ConnectionResetError
                self._reader.received(count)
            return decode_from_verifier(frame[1])
        except ConnectionError as error:
            status = await asyncio.to_thread(self._wait)
            raise _lost(f"it ended without a verdict (exit status {status})") from error
        except ProtocolViolation as error:
            raise _lost(error.message) from error

    async def end(self) -> None:
        """Kill it if it is still there, and reap it."""
        self._ours.close()
        self._process.kill()
        await asyncio.to_thread(self._wait)

    def _wait(self) -> int | None:
        try:
            return self._process.wait(timeout=_REAP_S)
        except subprocess.TimeoutExpired:
            return None


def _lost(why: str) -> TrustError:
    return TrustError(
        f"the verifier was lost: {why}",
        code="trust.verifier_lost",
        hint="nothing was installed; if it happens again, what the hub serves may be meant to do that",
    )
