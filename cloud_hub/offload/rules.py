"""Who is let in, who runs with whom, and who is told no at once: decisions over times and row counts only.

Rules of this file:
1. No timer: whatever waits when the engine becomes free is the next batch. Waiting for company costs at low load and
   gains nothing at high load.
2. A request is let in only if its answer is predicted in time, from how long batches have been taking; one that can no
   longer be in time when its turn comes is dropped. Serving late answers is how a server with twice the load it can
   carry comes to serve nobody; and a "no" at once lets a device fall back to its own answer.
3. An idle engine takes whatever still has time: a stale prediction must not lock a model for ever.
4. While more than a batch waits, those who cannot be in time with a full batch go; shrinking batches to save them
   would cost all who come after. While less waits, the batch is made as small as its tightest deadline needs.

Sources: Clockwork (Gujarati et al., OSDI 2020) for deciding by predicted times; the server's `schedule_policy`
extension for `timeout`. Not here: clocks, threads, tensors, protocols.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final, Generic, Literal, TypeVar

Reason = Literal["late", "queue"]
"""`late`: no answer could be in time. `queue`: as much waits as may."""

MAX_BATCH_ROWS: Final = 32
MAX_WAITING_ROWS: Final = 4096
"""Per model; at most as many requests hold memory."""
MAX_REQUEST_ROWS: Final = 1024
SAFETY: Final = 1.15
"""Predictions are taken this many times longer than they are."""
_WEIGHT: Final = 0.2
"""Of the newest measurement in the moving average."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ticket(Generic[T]):
    """A request that waits.

    Attributes:
        rows: how many rows it has.
        shape: what must be equal for two requests to share a batch.
        arrived_us, deadline_us: on the clock that every other time here is read from.
        load: what the caller wants back with it.
    """

    rows: int
    shape: object
    arrived_us: int
    deadline_us: int
    load: T


@dataclass(frozen=True, slots=True)
class Refused:
    """A "no", and after how many microseconds another try has a chance."""

    reason: Reason
    retry_after_us: int


@dataclass(frozen=True, slots=True)
class Batch(Generic[T]):
    """What runs next, in the order of arrival, and who was dropped on the way."""

    tickets: tuple[Ticket[T], ...]
    dropped: tuple[Ticket[T], ...]

    @property
    def rows(self) -> int:
        """Of all requests together."""
        return sum(ticket.rows for ticket in self.tickets)


class Pace:
    """How long batches take: a moving average for each power of two of rows."""

    def __init__(self) -> None:
        self._averages_us: dict[int, float] = {}

    def note(self, rows: int, took_us: int) -> None:
        """A batch of so many rows has taken so long."""
        bucket = _bucket(rows)
        before = self._averages_us.get(bucket)
        self._averages_us[bucket] = took_us if before is None else before + _WEIGHT * (took_us - before)

    def predict_us(self, rows: int) -> float:
        """How long a batch of so many rows will take; 0.0 while nothing is known.

        A size that never ran takes what the next larger one took, or the largest known one in proportion.
        """
        bucket = _bucket(rows)
        known = self._averages_us.get(bucket)
        if known is not None or not self._averages_us:
            return known or 0.0
        larger = [other for other in self._averages_us if other > bucket]
        if larger:
            return self._averages_us[min(larger)]
        largest = max(self._averages_us)
        return self._averages_us[largest] * float(2 ** (bucket - largest))


class Line(Generic[T]):
    """The requests that wait for one engine. The owner calls `offer`, then in turns `form` and `finish`.

    Args:
        max_batch_rows: of a batch; a request with more rows runs alone.
        max_waiting_rows: of all that wait.
    """

    def __init__(self, *, max_batch_rows: int = MAX_BATCH_ROWS, max_waiting_rows: int = MAX_WAITING_ROWS) -> None:
        self.pace = Pace()
        self._max_batch_rows = max_batch_rows
        self._max_waiting_rows = max_waiting_rows
        self._waiting: deque[Ticket[T]] = deque()
        self._rows = 0
        self._free_us: float | None = None

    @property
    def waiting_rows(self) -> int:
        """How many rows wait."""
        return self._rows

    def offer(self, ticket: Ticket[T], *, now_us: int) -> Refused | None:
        """Let the request in, or say why not."""
        idle = self._free_us is None and not self._waiting
        wait_us = self.wait_us(now_us=now_us)
        if self._rows + ticket.rows > self._max_waiting_rows and not idle:
            return Refused("queue", retry_after_us=int(wait_us))
        finish_us = now_us if idle else now_us + SAFETY * (wait_us + self._last_us(ticket.rows))
        if ticket.deadline_us < finish_us or ticket.deadline_us <= now_us:
            return Refused("late", retry_after_us=int(wait_us))
        self._waiting.append(ticket)
        self._rows += ticket.rows
        return None

    def wait_us(self, *, now_us: int) -> float:
        """How long one who comes now will wait for a turn."""
        # An overdue engine is not about to be free: what is late by so much may well be late by as much again.
        rest_us = 0.0 if self._free_us is None else abs(self._free_us - now_us)
        return rest_us + (self._rows // self._max_batch_rows) * self.pace.predict_us(self._max_batch_rows)

    def form(self, *, now_us: int) -> Batch[T]:
        """The next batch; the engine is busy with it until `finish`. Empty when nothing waits that can be in time."""
        chosen: list[Ticket[T]] = []
        dropped: list[Ticket[T]] = []
        rows, deadline_us = 0, float("inf")
        crowded = self._rows > self._max_batch_rows
        full_us = SAFETY * self.pace.predict_us(self._max_batch_rows)
        while self._waiting:
            head = self._waiting[0]
            if chosen and (rows + head.rows > self._max_batch_rows or head.shape != chosen[0].shape):
                break
            alone_us = SAFETY * self.pace.predict_us(head.rows)
            needs_us = max(full_us, alone_us) if crowded else alone_us
            if head.deadline_us < now_us + needs_us and not self._is_last_hope(head, now_us=now_us, chosen=chosen):
                dropped.append(self._take())
                continue
            deadline_us = min(deadline_us, head.deadline_us)
            if not crowded and chosen and deadline_us < now_us + SAFETY * self.pace.predict_us(rows + head.rows):
                break
            chosen.append(self._take())
            rows += head.rows
        self._free_us = now_us + self.pace.predict_us(rows) if chosen else None
        return Batch(tickets=tuple(chosen), dropped=tuple(dropped))

    def finish(self, rows: int, *, took_us: int) -> None:
        """The engine is free again, after so long with so many rows."""
        self.pace.note(rows, took_us)
        self._free_us = None

    def withdraw(self, ticket: Ticket[T]) -> bool:
        """This request waits no longer; False when it does not wait, because its batch runs or has run."""
        for place, waiting in enumerate(self._waiting):
            if waiting is ticket:
                del self._waiting[place]
                self._rows -= ticket.rows
                return True
        return False

    def clear(self) -> tuple[Ticket[T], ...]:
        """Everybody who waits, who waits no longer."""
        gone = tuple(self._waiting)
        self._waiting.clear()
        self._rows = 0
        return gone

    def _is_last_hope(self, head: Ticket[T], *, now_us: int, chosen: list[Ticket[T]]) -> bool:
        # Only the prediction speaks against it, and nobody is delayed by finding out whether it is still true.
        return not chosen and len(self._waiting) == 1 and head.deadline_us > now_us

    def _take(self) -> Ticket[T]:
        ticket = self._waiting.popleft()
        self._rows -= ticket.rows
        return ticket

    def _last_us(self, rows: int) -> float:
        """How long the batch will take that one with so many rows comes into."""
        before = self._rows % self._max_batch_rows
        if self._rows >= self._max_batch_rows:
            return self.pace.predict_us(max(self._max_batch_rows, rows))
        return self.pace.predict_us(before + rows)


def _bucket(rows: int) -> int:
    return (max(rows, 1) - 1).bit_length()
