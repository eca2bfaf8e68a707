"""`Verifier` in a child process: starts it, fetches what it asks for, keeps what it accepted, and ends it.

What is kept lies in the trust directory (edge_agent/adapters/trust_folder.py).

This module loads neither tuf nor cryptography: what others sent is only looked into by the child.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import msgspec
from msgspec.structs import replace

from edge_agent.adapters.trust_folder import TrustFolder
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
    Attested,
    Fed,
    FromVerifier,
    Job,
    Judged,
    Keep,
    KeepManifest,
    Need,
    Refused,
    StoredJob,
    StoredRelease,
    TimeJob,
    ToVerifier,
    decode_from_verifier,
    encode,
)

logger = logging.getLogger(__name__)

DEADLINE_MS: Final = 120_000
MAX_OLDER_MANIFESTS: Final = 32
"""Of releases that the accepted assignment does not name; one of them may be what a slot went back to."""

_REAP_S: Final = 5.0


class _SignedRoot(msgspec.Struct, frozen=True):
    version: int


class _RootFile(msgspec.Struct, frozen=True):
    signed: _SignedRoot


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

    def part(self, digest: Digest) -> int:
        """Raises StorageError: there is no file behind it."""
        raise StorageError(f"{digest} is only held in memory")

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
        profile: str,
        fetcher: Fetcher,
        accept_learned: bool = False,
        deadline_ms: int = DEADLINE_MS,
        command: tuple[str, ...] = (sys.executable, "-I", "-m", "edge_agent.verifier"),
    ) -> None:
        """
        Args:
            trust_dir: `<state>/trust`, holding root.json.
            device: the name on this device's certificate.
            profile: the name of its profile; a release may be signed for some profiles only.
            fetcher: how to reach the hub.
            accept_learned: whether this device opted in to learned releases.
            deadline_ms: for a whole verification, its downloads included.
            command: starts the child; our process id is appended.
        """
        self._folder = TrustFolder(trust_dir)
        self._device = device
        self._profile = profile
        self._fetcher = fetcher
        self._accept_learned = accept_learned
        self._deadline_ms = deadline_ms
        self._command = command
        self._turn = asyncio.Lock()

    async def verify(
        self, document: bytes, *, floors: Floors, wall_ms: int, time_attested: bool = False
    ) -> VerifiedAssignment:
        """The verified assignment.

        Raises:
            TrustError: with the attack's name; `trust.verifier_lost` when the child ended without a verdict.
            TransferError: a file could not be had; `transfer.deadline` when time ran out.
            OutriderError: `verifier.start` when the system starts no child.
        """
        if len(document) > limits.MAX_ASSIGNMENT_BYTES:
            raise TrustError(f"an assignment of {len(document)} bytes is too large", code="trust.endless_data")
        async with self._in_turn():
            job = await asyncio.to_thread(self._job, document, floors, wall_ms, time_attested)
            verdict = await self._run(job)
            if not isinstance(verdict, Accepted):
                raise _lost("it answered another question")
            await asyncio.to_thread(self._keep_accepted, document, verdict.verified)
            return verdict.verified

    async def attest(self, answer: bytes, *, nonce: str, floors: Floors) -> int:
        """The time that the hub's answer attests, in milliseconds since 1970; newer roots in it are kept.

        Raises as `verify` does; the codes of an answer that is not to be trusted lie below `trust.time`.
        """
        async with self._in_turn():
            root = await asyncio.to_thread(self._folder.root)
            job = TimeJob(answer=answer, device=self._device, nonce=nonce, root=root, floors=floors)
            verdict = await self._run(job)
            if not isinstance(verdict, Attested):
                raise _lost("it answered another question")
            return verdict.time_ms

    async def root_version(self) -> int:
        """The version of the newest trusted root; 0 when it cannot be told."""
        try:
            data = await asyncio.to_thread(self._folder.root)
            return msgspec.json.decode(data, type=_RootFile).signed.version
        except (TrustError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return 0

    @contextlib.asynccontextmanager
    async def _in_turn(self) -> AsyncIterator[None]:
        async with self._turn:
            try:
                async with asyncio.timeout(self._deadline_ms / 1000):
                    yield
            except TimeoutError as error:
                raise Unreachable(
                    f"the verification was not done within {self._deadline_ms} ms",
                    code="transfer.deadline",
                    hint="look at the link to the hub; the agent tries again by itself",
                ) from error

    async def _run(self, job: Job | TimeJob) -> Accepted | Attested:
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
                    case KeepManifest(digest=digest, data=data):
                        await asyncio.to_thread(self._folder.keep_manifest, digest, data)
                        await child.send(Fed())
                    case Accepted() | Attested() as verdict:
                        return verdict
                    case Refused(code=code, message=message, hint=hint):
                        kind = TransferRefused if code.startswith("transfer.") else TrustError
                        raise kind(message, code=code, hint=hint)
                    case Judged():
                        raise _lost("it judged what it was not asked about")
        finally:
            await child.end()

    def _job(self, document: bytes, floors: Floors, wall_ms: int, time_attested: bool) -> Job:
        return Job(
            document=document,
            device=self._device,
            profile=self._profile,
            root=self._folder.root(),
            cache=self._folder.cache(),
            previous=self._folder.previous(),
            floors=floors,
            wall_ms=wall_ms,
            time_attested=time_attested,
            accept_learned=self._accept_learned,
        )

    async def judge(self, releases: tuple[StoredRelease, ...], *, floors: Floors) -> Judged:
        """What of these releases does not hold any more, from what is stored; manifests that nothing names go.

        Raises:
            TrustError: `trust.no_root` before the enrolment, `trust.verifier_lost` when the child said nothing.
            Unreachable: time ran out.
            OutriderError: `verifier.start` when the system starts no child.
        """
        async with self._turn:
            try:
                async with asyncio.timeout(self._deadline_ms / 1000):
                    return await self._judge(releases, floors)
            except TimeoutError as error:
                raise Unreachable("what is installed was not judged in time", code="transfer.deadline") from error

    async def _judge(self, releases: tuple[StoredRelease, ...], floors: Floors) -> Judged:
        job = await asyncio.to_thread(self._stored_job, releases, floors)
        child = _Child(self._command)
        try:
            await child.send(job)
            del job
            match await child.receive():
                case Judged() as judged:
                    named = frozenset(release.digest for release in releases)
                    await asyncio.to_thread(self._folder.collect_manifests, named)
                    return judged
                case other:
                    raise _lost(f"it said {type(other).__name__} where nothing may be asked")
        finally:
            await child.end()

    def _stored_job(self, releases: tuple[StoredRelease, ...], floors: Floors) -> StoredJob:
        return StoredJob(
            document=self._folder.previous(),
            device=self._device,
            profile=self._profile,
            root=self._folder.root(),
            cache=self._folder.cache(),
            floors=floors,
            releases=tuple(replace(release, data=self._folder.manifest(release.digest)) for release in releases),
            accept_learned=self._accept_learned,
        )

    def _keep_accepted(self, document: bytes, verified: VerifiedAssignment) -> None:
        self._folder.keep_assignment(document)
        named = frozenset(model.manifest_digest for model in verified.models)
        self._folder.collect_manifests(named, at_most=MAX_OLDER_MANIFESTS)

    async def _fetch(self, need: Need) -> bytes | None:
        try:
            if need.file is None:
                return await self._fetcher.metadata(need.name, max_bytes=need.max_bytes)
            kept = await asyncio.to_thread(self._folder.manifest, need.file.digest)
            if kept is not None and hashlib.sha256(kept).hexdigest() == need.file.digest:
                return kept
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
