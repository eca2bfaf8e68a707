"""`Comparer` over the shelf: hands two descriptors to a child process and believes its one line.

Rules: both files are hashed through the descriptors that the child reads, before it starts; only a child that says so
plainly lets a file pass; one that is lost, late or cannot be started says nothing against the release either.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from typing import Final

import msgspec

from edge_agent.adapters.errand import closing, run_errand
from edge_agent.opening import open_verified
from edge_agent.update_ports import Shelf
from shared.errors import OutriderError, TrustError
from shared.model import FileRef
from shared.release import LEARNED_CODE, Ground

logger = logging.getLogger(__name__)

DEADLINE_MS: Final = 120_000


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What the child says (edge_agent/comparer.py, Outcome); the shift is always said when all is well."""

    code: str
    message: str
    shift: float


class LiveComparer:
    """`Comparer`: one child process for each comparison."""

    def __init__(
        self,
        *,
        shelf: Shelf,
        deadline_ms: int = DEADLINE_MS,
        command: tuple[str, ...] = (sys.executable, "-I", "-m", "edge_agent.comparer"),
    ) -> None:
        """
        Args:
            shelf: where both files are.
            deadline_ms: for one comparison.
            command: starts the child; our process id, two descriptors and the order are appended.
        """
        self._shelf = shelf
        self._deadline_ms = deadline_ms
        self._command = command

    async def compare(self, file: FileRef, ground: Ground) -> None:
        """Return if this file keeps to its bounds.

        Raises:
            TrustError: `trust.learned`, it does not.
            TransferCorrupt, StorageError: one of the files is not what it was, or the disk refuses.
            OutriderError: `comparer.start`, `.deadline`, `.lost`: that is no word on it.
        """
        if file.length != ground.file.length:
            raise TrustError("the learned file has another length than its base's", code=LEARNED_CODE)
        with contextlib.ExitStack() as opened:
            descriptors = [
                opened.enter_context(closing(await open_verified(self._shelf, one))) for one in (file, ground.file)
            ]
            outcome = await self._run(file, ground, descriptors)
        if outcome.code == LEARNED_CODE:
            raise TrustError(
                outcome.message, code=LEARNED_CODE, hint="let a person sign this release, or learn it again"
            )
        if outcome.code:
            raise _lost(outcome.message, "lost")
        logger.info("learned file compared", extra={"file": file.path, "shift": outcome.shift})

    async def _run(self, file: FileRef, ground: Ground, descriptors: list[int]) -> Outcome:
        order = msgspec.json.encode({"bounds": ground.bounds, "length": file.length})
        try:
            said, status = await run_errand(self._command, descriptors, order, deadline_ms=self._deadline_ms)
        except TimeoutError as error:
            raise _lost(f"the files were not compared within {self._deadline_ms} ms", "deadline") from error
        except OSError as error:
            raise _lost(f"the comparer cannot be started: {error}", "start") from error
        try:
            return msgspec.json.decode(said, type=Outcome)
        except msgspec.MsgspecError as error:
            raise _lost(f"the comparer ended without a word (exit status {status})", "lost") from error


def _lost(message: str, why: str) -> OutriderError:
    return OutriderError(message[:300], code=f"comparer.{why}", hint="nothing was installed; it is tried again")
