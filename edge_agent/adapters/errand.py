"""One run of a short-lived child that is given open descriptors and says how it ended in one line.

Rules: started from the loop's own thread, because the parent-death signal is bound to the thread that starts the
child; whatever happens it is killed and reaped; no more is read of it than a line may have.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections.abc import Iterator, Sequence
from typing import Final

MAX_OUTCOME_BYTES: Final = 4096
_REAP_S: Final = 5.0


async def run_errand(
    command: Sequence[str], descriptors: Sequence[int], order: bytes, *, deadline_ms: int
) -> tuple[bytes, int | None]:
    """What the child said, and its exit status (None when it could not be reaped in time).

    Args:
        command: starts it; our process id, the descriptors and the order are appended.
        descriptors: what it may read and write; they stay open here.
        order: JSON.

    Raises:
        OSError: the system starts no child.
        TimeoutError: it was not done in time.
    """
    process, said_at = _start(command, descriptors, order)
    with closing(said_at):
        try:
            async with asyncio.timeout(deadline_ms / 1000):
                said = await _read_line(said_at)
        finally:
            process.kill()
            status = await asyncio.to_thread(_wait, process)
    return said, status


def _start(command: Sequence[str], descriptors: Sequence[int], order: bytes) -> tuple[subprocess.Popen[bytes], int]:
    """The child, and where its word will come."""
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    with closing(write_end):
        try:
            process = subprocess.Popen(
                [*command, str(os.getpid()), *map(str, descriptors), order.decode()],
                stdin=subprocess.DEVNULL,
                stdout=write_end,
                pass_fds=descriptors,
                cwd="/",
                env={"LC_ALL": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1"},
            )
        except OSError:
            os.close(read_end)
            raise
    return process, read_end


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
def closing(descriptor: int) -> Iterator[int]:
    """The descriptor, closed at the end."""
    try:
        yield descriptor
    finally:
        os.close(descriptor)
