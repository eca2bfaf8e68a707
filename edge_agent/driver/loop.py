"""The inbox, and the owner of every task and timer of the agent.

Rules of this file:
1. Whatever happens becomes an event in the inbox; events are handled one after the other, on one thread.
2. A task belongs to a name; starting another under the same name cancels the first. All belong to one task group, so
   a defect in any of them ends the process loudly instead of leaving half an agent behind.
3. A timer belongs to a name too, and only ever posts an event.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Hashable
from typing import Any, Final

from edge_agent.driver.events import Inward, MessageArrived

logger = logging.getLogger(__name__)

MAX_UNHANDLED: Final = 1_000
"""Events beyond which messages are not taken in: whoever floods a device shall not fill its memory."""


class Inbox:
    """What has happened and was not handled yet, in order of arrival.

    What happened here is never dropped. A message from the hub is, when too much waits: the hub says it again, since
    it gets no answer to it.
    """

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Inward] = asyncio.Queue()
        self._is_flooded = False

    def post(self, event: Inward) -> None:
        """Append an event; only from the loop's thread."""
        if isinstance(event, MessageArrived):
            flooded = self._queue.qsize() >= MAX_UNHANDLED
            if flooded and not self._is_flooded:
                logger.warning("messages are dropped", extra={"unhandled": self._queue.qsize()})
            self._is_flooded = flooded
            if flooded:
                return
        self._queue.put_nowait(event)

    async def next(self) -> Inward:
        """The oldest event, waiting for one if need be."""
        return await self._queue.get()


class Works:
    """Named tasks in a task group."""

    def __init__(self, group: asyncio.TaskGroup) -> None:
        self._group = group
        self._tasks: dict[Hashable, asyncio.Task[None]] = {}

    def start(self, name: Hashable, work: Coroutine[Any, Any, None]) -> None:
        """Run this work under this name, cancelling what runs under it."""
        self.cancel(name)
        task = self._group.create_task(work, name=str(name))
        self._tasks[name] = task
        task.add_done_callback(lambda done: self._forget(name, done))

    def cancel(self, name: Hashable) -> None:
        """Cancel the work of this name, if it runs."""
        task = self._tasks.pop(name, None)
        if task is not None:
            task.cancel()

    def running(self, name: Hashable) -> bool:
        """Whether work runs under this name."""
        return name in self._tasks

    def cancel_all(self) -> None:
        """Cancel everything; for the end."""
        for name in list(self._tasks):
            self.cancel(name)

    def _forget(self, name: Hashable, task: asyncio.Task[None]) -> None:
        if self._tasks.get(name) is task:
            del self._tasks[name]


class Timers:
    """Named timers that post events."""

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox
        self._handles: dict[Hashable, asyncio.TimerHandle] = {}

    def start(self, name: Hashable, delay_ms: int, event: Inward) -> None:
        """Post this event after this time, forgetting an earlier timer of the same name."""
        self.stop(name)
        loop = asyncio.get_running_loop()
        self._handles[name] = loop.call_later(delay_ms / 1000, self._fire, name, event)

    def stop(self, name: Hashable) -> None:
        """Forget this timer, if it runs."""
        handle = self._handles.pop(name, None)
        if handle is not None:
            handle.cancel()

    def stop_all(self) -> None:
        """Forget every timer; for the end."""
        for name in list(self._handles):
            self.stop(name)

    def _fire(self, name: Hashable, event: Inward) -> None:
        self._handles.pop(name, None)
        self._inbox.post(event)


class Loop:
    """The inbox, the tasks and the timers of one agent."""

    def __init__(self, group: asyncio.TaskGroup) -> None:
        """Tasks belong to this group."""
        self.inbox = Inbox()
        self.works = Works(group)
        self.timers = Timers(self.inbox)

    def end(self) -> None:
        """Forget every timer and cancel every task."""
        self.timers.stop_all()
        self.works.cancel_all()
