"""The hub's end of a worker: starts it, speaks frames with it, and sees that it is gone when the run is.

It dies with the hub (parent-death signal), ends when the socket closes, and starts in the run's folder without the
hub's environment. What its libraries print is kept as a short tail, for when it ends by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from cloud_hub.ground import leash
from cloud_hub.rounds import frames
from shared.errors import OutriderError, StorageError

TAIL_BYTES: Final = 4096
LOG: Final = "worker.log"


class WorkerLost(OutriderError):
    """The worker ended by itself; what it did since the last finished round is done again."""

    code = "rounds.worker_lost"
    retry = True


@dataclass(frozen=True, slots=True)
class Worker:
    """A running worker."""

    pid: int
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    log: Path

    async def send(self, frame: frames.ToWorker) -> None:
        """Hand over a frame; raises WorkerLost."""
        try:
            self.writer.write(frames.encode(frame))
            await self.writer.drain()
        except (ConnectionError, RuntimeError) as error:
            raise self._lost() from error

    async def receive(self) -> frames.ToHub:
        """The worker's next frame; raises WorkerLost."""
        try:
            prefix = await self.reader.readexactly(frames.LENGTH.size)
            return frames.for_hub(await self.reader.readexactly(frames.length_of(prefix)))
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise self._lost() from error

    def _lost(self) -> WorkerLost:
        said = ""
        with contextlib.suppress(OSError):
            text = self.log.read_bytes()[-TAIL_BYTES:].decode(errors="replace")
            lines = [line for line in text.splitlines() if line.strip()]
            said = f": {lines[-1][:300]}" if lines else ""
        return WorkerLost(f"the run's worker ended by itself{said}")


@contextlib.asynccontextmanager
async def worker(kind: Literal["run", "inspect"], *, folder: Path) -> AsyncIterator[Worker]:
    """A worker that is gone when the block is left, however it is left."""
    ours, theirs = socket.socketpair()
    log = folder / LOG
    with contextlib.closing(theirs):
        try:
            child = await _start(kind, folder=folder, end=theirs, log=log)
        except BaseException:
            ours.close()
            raise
    try:
        ours.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=ours)
        try:
            yield Worker(pid=child.pid, reader=reader, writer=writer, log=log)
        finally:
            writer.close()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        await child.wait()


async def _start(kind: str, *, folder: Path, end: socket.socket, log: Path) -> asyncio.subprocess.Process:
    assert leash.__file__ is not None
    number = end.fileno()
    try:
        # Started from the loop's own thread: the parent-death signal is bound to the thread that starts the child.
        with log.open("wb") as stderr:
            return await asyncio.create_subprocess_exec(
                sys.executable, "-I", "-S", leash.__file__, str(os.getpid()),
                sys.executable, "-I", "-m", frames.MODULE, kind, str(number),
                cwd=folder,
                env={
                    "LANG": "C.UTF-8",
                    "HOME": str(folder),
                    "TMPDIR": str(folder),
                    "OMP_NUM_THREADS": "1",
                    "OPENBLAS_NUM_THREADS": "1",
                    "FLWR_TELEMETRY_ENABLED": "0",
                },
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=stderr,
                pass_fds=(number,),
                start_new_session=True,
            )  # fmt: skip
    except OSError as error:
        raise StorageError(f"a worker cannot be started: {error}", code="storage.worker") from error
