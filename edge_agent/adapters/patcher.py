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
import sys
from typing import Final

import msgspec

from edge_agent.adapters.errand import closing, run_errand
from edge_agent.update_ports import Shelf
from shared import limits
from shared.errors import PatchFailed, StorageError, StorageFull, TransferCorrupt
from shared.ids import Digest
from shared.model import FileRef
from shared.release import Patch

logger = logging.getLogger(__name__)

DEADLINE_MS: Final = 600_000
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
                await asyncio.to_thread(self._shelf.publish, result)
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
                    opened.enter_context(closing(await asyncio.to_thread(self._shelf.open, base))),
                    opened.enter_context(closing(await asyncio.to_thread(self._shelf.open, file))),
                    opened.enter_context(closing(self._shelf.part(result.digest))),
                ]
            except TransferCorrupt as error:
                raise _failed(error.message, "source") from error
            except StorageFull:
                raise
            except StorageError as error:
                raise _failed(error.message, "source") from error
            return await self._attend(_order(patch, base, result), descriptors)

    async def _attend(self, order: bytes, descriptors: list[int]) -> Outcome:
        try:
            said, status = await run_errand(self._command, descriptors, order, deadline_ms=self._deadline_ms)
        except TimeoutError as error:
            raise _failed(f"the patch was not applied within {self._deadline_ms} ms", "deadline") from error
        except OSError as error:
            raise _failed(f"the patcher cannot be started: {error}", "start") from error
        try:
            return msgspec.json.decode(said, type=Outcome)
        except msgspec.MsgspecError as error:
            raise _failed(f"the patcher ended without a word (exit status {status})", "lost") from error

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


def _failed(message: str, why: str) -> PatchFailed:
    return PatchFailed(message, code=f"transfer.patch.{why}", hint=_HINT)
