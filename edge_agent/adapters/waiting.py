"""The waiting room of the door: who may wait for an answer, how much of it, and what an error is to the one who asked.

Rules: places and bytes are bounded over all connections and dialects together; a request that is let in runs in a task
of its own and gives its place back whatever happens; a defect in one request takes nothing from the others.

Not here: streams and dialects (door.py for frames, http_door.py for HTTP).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeAlias

from edge_agent.framing import Buffer
from shared import limits
from shared.errors import OutriderError
from shared.inference import Refusal, Reply, Request

logger = logging.getLogger(__name__)

MAX_HELD_BYTES: Final = 2 * limits.MAX_FRAME_PAYLOAD_BYTES
"""Memory for payloads that have arrived and wait for their answer, over all connections."""

Handle: TypeAlias = Callable[[Request, bytearray, float], Awaitable[tuple[Reply, Sequence[Buffer]]]]
"""Answers one request, of which it gets the payload and the moment when it was read, on the event loop's clock: the
reply and the pieces of its payload; an OutriderError becomes a Refusal."""


class WaitingRoom:
    """Bounds what waits, and runs it."""

    def __init__(self, *, handle: Handle, tasks: asyncio.TaskGroup) -> None:
        """Tasks belong to the caller's group."""
        self._handle = handle
        self._tasks = tasks
        self._waiting = 0
        self._held_bytes = 0
        self._is_open = False

    def open(self) -> None:
        """Let requests in."""
        self._is_open = True

    def close(self) -> None:
        """Let no more in; those inside are worked on."""
        self._is_open = False

    def enter(self, request: str, size: int, work: Callable[[Place], Awaitable[None]]) -> Refusal | None:
        """Run `work` in a task of its own; a refusal when too many, or too large ones, wait already.

        Args:
            request: its id, for the refusal.
            size: bytes of it that are held until `work` is done.
            work: answers it.
        """
        if self._waiting >= limits.MAX_WAITING_REQUESTS or not self._is_open:
            return overload(request, "overload", f"{limits.MAX_WAITING_REQUESTS} requests wait for an answer")
        place = Place(self)
        refused = place.grow(size, request=request)
        if refused is not None:
            return refused
        self._waiting += 1
        self._tasks.create_task(self._run(place, work), name="door request")
        return None

    async def reply_to(self, request: Request, payload: bytearray, arrived: float) -> tuple[Reply, Sequence[Buffer]]:
        """The agent's reply; whatever goes wrong is a Refusal."""
        try:
            return await self._handle(request, payload, arrived)
        except OutriderError as error:
            return refusal(request.id, error), ()
        except TimeoutError:
            return Refusal(id=request.id, code="deadline", message="no answer was ready in time", retry=True), ()
        except Exception:  # a defect in the answer to one application must not take the agent from the others
            logger.exception("a request at the door failed")
            return Refusal(id=request.id, code="internal", message="the agent failed; its log says why"), ()

    def take(self, size: int, *, request: str) -> Refusal | None:
        """Count bytes that a place holds, or refuse them."""
        if self._held_bytes + size > MAX_HELD_BYTES:
            message = f"the requests that wait for an answer hold {self._held_bytes} of {MAX_HELD_BYTES} bytes"
            return overload(request, "overload.memory", message)
        self._held_bytes += size
        return None

    async def _run(self, place: Place, work: Callable[[Place], Awaitable[None]]) -> None:
        try:
            await work(place)
        except Exception:  # as above: the task's group is the agent's
            logger.exception("an answer at the door could not be sent")
        finally:
            self._waiting -= 1
            self._held_bytes -= place.size


class Place:
    """What one request takes in the waiting room, and since when.

    Attributes:
        arrived: when the request had been read, on the event loop's clock.
        size: bytes of it that are held.
    """

    def __init__(self, room: WaitingRoom) -> None:
        self._room = room
        self.arrived = asyncio.get_running_loop().time()
        self.size = 0

    def grow(self, size: int, *, request: str = "") -> Refusal | None:
        """Hold `size` bytes more, or be refused and hold what was held."""
        refused = self._room.take(size, request=request)
        if refused is None:
            self.size += size
        return refused


def overload(request: str, code: str, message: str) -> Refusal:
    """A refusal for now, because of what others have asked."""
    return Refusal(id=request, code=code, message=message, hint="ask again later", retry=True)


def refusal(request: str, error: OutriderError) -> Refusal:
    """An error as the caller gets it."""
    return Refusal(id=request, code=error.code, message=error.message, hint=error.hint, retry=error.retry)
