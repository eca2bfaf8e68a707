"""`Patcher` over the shelf: hands three descriptors to a child process, waits for its word, and publishes.

Rules: base and patch are hashed through the descriptors that the child reads, before it starts; the child writes only
to the unfinished file of the result; what it wrote is believed when the shelf has hashed it. Whatever fails, the
unfinished file is emptied, so that a download does not go on behind it, and the error is PatchFailed: the whole file
is fetched. Only a full disk stays StorageFull, because the whole file would not fit either.

This module loads no numpy; the child does.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from typing import Final

import msgspec

from edge_agent.opening import open_verified, to_its_end
from edge_agent.update_ports import Shelf
from shared import limits
from shared.errors import PatchFailed, StorageError, StorageFull, TransferCorrupt
from shared.ids import Digest
from shared.model import FileRef
from shared.release import Patch

logger = logging.getLogger(__name__)

DEADLINE_MS: Final = 600_000
MAX_OUTCOME_BYTES: Final = 4096
_REAP_S: Final = 5.0
_HINT: Final = "the whole file is fetched instead"


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What the child says (edge_agent/patcher.py, Outcome)."""

    code: str = ""
    message: str = ""
    peak_bytes: int = 0


class LivePatcher:
    """`Patcher`: one child process for each patch, one patch at a time."""

    def __init__(
        self,
        *,
        shelf: Shelf,
        deadline_ms: int = DEADLINE_MS,
        command: tuple[str, ...] = (sys.executable, "-I", "-m", "edge_agent.patcher"),
    ) -> None:
        """
        Args:
            shelf: where base and patch are and the result goes.
            deadline_ms: for one patch.
            command: starts the child; our process id, three descriptors and the order are appended.
        """
        self._shelf = shelf
        self._deadline_ms = deadline_ms
        self._command = command
        self._turn = asyncio.Lock()

    async def apply(self, patch: Patch, *, base: FileRef, result: FileRef) -> None:
        """Publish `result`; base and patch are on the shelf.

        Raises:
            PatchFailed: `transfer.patch.malformed`, `.terms`, `.base`, `.result`, `.memory` as the child says;
                `.source` (base or patch are not what they were), `.deadline`, `.lost`, `.start`, `.disk`.
            StorageFull: no room for the result.
        """
        if patch.base != base.digest or patch.result != result.digest or result.length > limits.MAX_MODEL_BYTES:
            raise _failed("the patch is for other files", "terms")
        async with self._turn:
            try:
                outcome = await self._run(patch, base=base, result=result)
                _check(outcome)
                # Not to be emptied while it is hashed: what has the name in the end would not be what was hashed.
                await to_its_end(partial(self._shelf.publish, result))
            except BaseException as error:
                self._empty(result.digest)
                if isinstance(error, TransferCorrupt):
                    raise _failed(error.message, "result") from error
                raise
        logger.info(
            "patch applied", extra={"digest": result.digest, "bytes": patch.length, "peak_bytes": outcome.peak_bytes}
        )

    async def _run(self, patch: Patch, *, base: FileRef, result: FileRef) -> Outcome:
        file = FileRef(path=f"patch {patch.digest[:12]}", length=patch.length, digest=patch.digest)
        with contextlib.ExitStack() as opened:
            try:
                descriptors = [
                    opened.enter_context(_closing(await open_verified(self._shelf, base))),
                    opened.enter_context(_closing(await open_verified(self._shelf, file))),
                    opened.enter_context(_closing(self._shelf.part(result.digest))),
                ]
            except TransferCorrupt as error:
                raise _failed(error.message, "source") from error
            except StorageFull:
                raise
            except StorageError as error:
                raise _failed(error.message, "source") from error
            return await self._attend(_order(patch, base, result), descriptors)

    async def _attend(self, order: bytes, descriptors: list[int]) -> Outcome:
        # Started from the loop's own thread: the parent-death signal is bound to the thread that starts the child.
        process, said_at = self._start(order, descriptors)
        with _closing(said_at):
            try:
                async with asyncio.timeout(self._deadline_ms / 1000):
                    said = await _read_line(said_at)
            except TimeoutError as error:
                raise _failed(f"the patch was not applied within {self._deadline_ms} ms", "deadline") from error
            finally:
                process.kill()
                status = await asyncio.to_thread(_wait, process)
        try:
            return msgspec.json.decode(said, type=Outcome)
        except msgspec.MsgspecError as error:
            raise _failed(f"the patcher ended without a word (exit status {status})", "lost") from error

    def _start(self, order: bytes, descriptors: list[int]) -> tuple[subprocess.Popen[bytes], int]:
        """The child, and where its word will come; raises PatchFailed."""
        read_end, write_end = os.pipe()
        os.set_blocking(read_end, False)
        with _closing(write_end):
            try:
                process = subprocess.Popen(
                    [*self._command, str(os.getpid()), *map(str, descriptors), order.decode()],
                    stdin=subprocess.DEVNULL,
                    stdout=write_end,
                    pass_fds=descriptors,
                    cwd="/",
                    env={"LC_ALL": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1"},
                )
            except OSError as error:
                os.close(read_end)
                raise _failed(f"the patcher cannot be started: {error}", "start") from error
        return process, read_end

    def _empty(self, digest: Digest) -> None:
        """A download must not go on behind what a patch began."""
        with contextlib.suppress(StorageError):
            if self._shelf.resume_at(digest):
                self._shelf.append(digest, b"", offset=0)


def _order(patch: Patch, base: FileRef, result: FileRef) -> bytes:
    terms = {
        "base": base.digest,
        "base_length": base.length,
        "result": result.digest,
        "result_length": result.length,
    }
    return msgspec.json.encode({"terms": terms, "patch_length": patch.length})


def _check(outcome: Outcome) -> None:
    if not outcome.code:
        return
    kind, _, number = outcome.code.partition(".")
    if kind == "errno":
        if number in (str(errno.ENOSPC), str(errno.EDQUOT)):
            raise StorageFull("no room left for what the patch makes", hint="free disk space")
        raise _failed(f"the disk refused: {outcome.message[:200]}", "disk")
    code = outcome.code if outcome.code.startswith("transfer.patch.") else "transfer.patch.lost"
    raise PatchFailed(outcome.message[:300], code=code, hint=_HINT)


async def _read_line(descriptor: int) -> bytes:
    """What the child writes until it closes its end, up to a bound."""
    loop = asyncio.get_running_loop()
    data = bytearray()
    while len(data) <= MAX_OUTCOME_BYTES:
        readable = loop.create_future()
        loop.add_reader(descriptor, lambda waiting=readable: waiting.done() or waiting.set_result(None))  # type: ignore[misc]
        try:
            await readable
        finally:
            loop.remove_reader(descriptor)
        piece = os.read(descriptor, MAX_OUTCOME_BYTES)
        if not piece:
            break
        data += piece
    return bytes(data)


def _wait(process: subprocess.Popen[bytes]) -> int | None:
    try:
        return process.wait(timeout=_REAP_S)
    except subprocess.TimeoutExpired:
        return None


@contextlib.contextmanager
def _closing(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _failed(message: str, why: str) -> PatchFailed:
    return PatchFailed(message, code=f"transfer.patch.{why}", hint=_HINT)
