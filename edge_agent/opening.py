"""Work of a thread that the one who waits for it may give up: a thread cannot be stopped, and its result is somebody's.

Beside the rooms of the agent, because drivers and adapters need it alike.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from edge_agent.update_ports import Shelf
from shared.model import FileRef


async def open_verified(shelf: Shelf, file: FileRef) -> int:
    """The shelf's descriptor; closed again if by then nobody waits for it, because the thread cannot be stopped."""
    opening = asyncio.get_running_loop().run_in_executor(None, shelf.open, file)
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        opening.add_done_callback(_close)
        raise


async def to_its_end(work: Callable[[], None]) -> None:
    """Run this in a thread and return when it has ended, however often the one who waits is cancelled meanwhile.

    For work that others may only come after; a cancellation is raised when it is done.
    """
    working = asyncio.get_running_loop().run_in_executor(None, work)
    given_up: asyncio.CancelledError | None = None
    while not working.done():
        try:
            await asyncio.wait({working})
        except asyncio.CancelledError as error:
            given_up = error
    if given_up is not None:
        working.exception()  # nobody is left to hear it
        raise given_up
    working.result()


def _close(opening: asyncio.Future[int]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        os.close(opening.result())
