"""The load generator of the offload benchmark: a process of its own that speaks just enough HTTP/1.1.

`python -m tests.bench._offload_load PLAN` where PLAN is JSON (`Plan`); prints one JSON line (`Report`). Closed loop:
each client sends its next request when it has its answer. Open loop: requests leave at a rate whatever comes back, as
callers in the world do; that is the only way to see overload.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from typing import Final, cast

import msgspec
import uvloop

MAX_CONNECTIONS: Final = 768
_END: Final = b"\r\n\r\n"


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What to send where, and how.

    Attributes:
        request: the whole request, head and body.
        clients: of a closed loop.
        rate: requests a second of an open loop; 0.0 for a closed one.
        seconds, warm_up_s: how long to measure, and to run before that.
        deadline_ms: answers after this are late; 0 for never.
    """

    port: int
    request: bytes
    clients: int = 32
    rate: float = 0.0
    seconds: float = 8.0
    warm_up_s: float = 2.0
    deadline_ms: float = 0.0


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What came back: counts over the measured time, and times of answers in milliseconds."""

    seconds: float
    sent: int
    good: int
    late: int
    refused: int
    failed: int
    unsent: int
    p50_ms: float
    p99_ms: float


class Speaker(asyncio.Protocol):
    """One connection; one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._answer: asyncio.Future[int] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep it."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Look whether the answer is complete."""
        self._buffer += data
        head = self._buffer.find(_END)
        if head < 0 or self._answer is None:
            return
        lower = bytes(self._buffer[:head]).lower()
        place = lower.find(b"content-length:")
        length = int(lower[place + 15 :].split(b"\r\n", 1)[0]) if place >= 0 else 0
        if len(self._buffer) >= head + 4 + length:
            status = int(self._buffer[9:12])
            self._buffer.clear()
            self._settle(status)

    def connection_lost(self, _error: Exception | None) -> None:
        """An answer that will not come counts as status 0."""
        self._transport = None
        self._settle(0)

    def _settle(self, status: int) -> None:
        answer, self._answer = self._answer, None
        if answer is not None and not answer.done():
            answer.set_result(status)

    async def ask(self, request: bytes) -> int:
        """The status of the answer; 0 when the connection was lost."""
        if self._transport is None:
            return 0
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._answer

    def close(self) -> None:
        """Let it go."""
        if self._transport is not None:
            self._transport.abort()


class Tally:
    """Counts within the measured window."""

    def __init__(self, plan: Plan) -> None:
        now = time.perf_counter()
        self.begin = now + plan.warm_up_s
        self.end = self.begin + plan.seconds
        self._deadline_s = plan.deadline_ms / 1000 if plan.deadline_ms else float("inf")
        self.times: list[float] = []
        self.sent = self.late = self.refused = self.failed = self.unsent = 0

    def note(self, status: int, *, began: float) -> None:
        """An answer, or none."""
        if not self.begin <= began < self.end:
            return
        self.sent += 1
        took = time.perf_counter() - began
        if status == 200:
            self.times.append(took)
            self.late += took > self._deadline_s
        elif status in (429, 503, 504):
            self.refused += 1
        else:
            self.failed += 1

    def report(self, plan: Plan) -> Report:
        """The sums."""
        times = sorted(self.times) or [0.0]
        return Report(
            seconds=plan.seconds,
            sent=self.sent,
            good=len(self.times) - self.late,
            late=self.late,
            refused=self.refused,
            failed=self.failed,
            unsent=self.unsent,
            p50_ms=times[len(times) // 2] * 1000,
            p99_ms=times[int(len(times) * 0.99)] * 1000,
        )


async def connect(port: int) -> Speaker:
    """A connection."""
    _, speaker = await asyncio.get_running_loop().create_connection(Speaker, "127.0.0.1", port)
    return speaker


async def closed(plan: Plan, tally: Tally) -> None:
    """Each client asks again as soon as it has its answer."""

    async def client() -> None:
        speaker = await connect(plan.port)
        while (began := time.perf_counter()) < tally.end:
            status = await speaker.ask(plan.request)
            tally.note(status, began=began)
            if not status:
                raise ConnectionError("the server ended a connection")
        speaker.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(plan.clients):
            group.create_task(client())


async def open_loop(plan: Plan, tally: Tally) -> None:
    """Requests leave at random times of the given rate (Poisson), whatever comes back."""
    draw = random.Random(1)
    idle = [await connect(plan.port) for _ in range(64)]
    connections = len(idle)

    async def one(speaker: Speaker | None) -> None:
        speaker = speaker or await connect(plan.port)
        began = time.perf_counter()
        status = await speaker.ask(plan.request)
        tally.note(status, began=began)
        if status:
            idle.append(speaker)

    async with asyncio.TaskGroup() as group:
        due = time.perf_counter()
        while due < tally.end:
            now = time.perf_counter()
            if due > now:
                await asyncio.sleep(due - now)
            else:
                await asyncio.sleep(0)
            while due <= time.perf_counter():
                if idle:
                    group.create_task(one(idle.pop()))
                elif connections < MAX_CONNECTIONS:
                    connections += 1
                    group.create_task(one(None))
                elif tally.begin <= due:
                    tally.unsent += 1
                due += draw.expovariate(plan.rate)
    for speaker in idle:
        speaker.close()


async def run(plan: Plan) -> Report:
    """Carry out a plan."""
    tally = Tally(plan)
    async with asyncio.timeout(plan.warm_up_s + plan.seconds + 30):
        await (open_loop(plan, tally) if plan.rate else closed(plan, tally))
    return tally.report(plan)


if __name__ == "__main__":
    report = uvloop.run(run(msgspec.json.decode(sys.argv[1], type=Plan)))
    sys.stdout.write(msgspec.json.encode(report).decode() + "\n")
