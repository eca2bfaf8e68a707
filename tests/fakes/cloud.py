"""The hub's larger models without a hub: answers as told, or refuses, breaks, stalls."""

from __future__ import annotations

import asyncio

import msgspec

from edge_agent.ports import CloudAnswer, CloudRefusal
from shared.errors import Unreachable
from shared.inference import TensorHead
from shared.wire.oip import cut_payload


class Question(msgspec.Struct, frozen=True):
    """What was asked."""

    model: str
    inputs: tuple[TensorHead, ...]
    payload: bytes
    deadline_ms: int
    within_ms: int


def cloud_answer(label: str = "7", *, confidence: float = 0.99, version: str = "3.0.0") -> CloudAnswer:
    """An answer of the larger model with two scores."""
    return CloudAnswer(
        model="digits-large",
        version=version,
        variant="fp32",
        digest="c" * 64,
        label=label,
        confidence=confidence,
        outputs=(TensorHead(name="y", dtype="fp32", shape=(1, 2)),),
        payload=(bytes(range(8)),),
        size_bytes=200,
        took_ms=5,
    )


class FakeCloud:
    """`ports.Cloud` in memory.

    Attributes:
        says: the reply to the next questions, raised if it is an error, a defect of an implementation included.
        stalls: while set, questions are taken and not answered; clearing it with `go_on` answers them.
        asked: every question that came in.
    """

    def __init__(self) -> None:
        self.says: CloudAnswer | CloudRefusal | Exception = cloud_answer()
        self.stalls = False
        self.asked: list[Question] = []
        self.closed = False
        self._waiting: set[asyncio.Future[None]] = set()

    def go_on(self) -> None:
        """Answer everything that waits."""
        self.stalls = False
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None)

    async def ask(
        self,
        model: str,
        inputs: tuple[TensorHead, ...],
        payload: bytes | bytearray | memoryview,
        *,
        deadline_ms: int,
        within_ms: int,
    ) -> CloudAnswer | CloudRefusal:
        """Reply as told; raises InputRefused as every implementation does."""
        cut_payload(inputs, payload)
        self.asked.append(Question(model, inputs, bytes(payload), deadline_ms, within_ms))
        await asyncio.sleep(0)
        if self.stalls:
            waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.add(waiting)
            try:
                async with asyncio.timeout(within_ms / 1000):
                    await waiting
            except TimeoutError as error:
                raise Unreachable("no answer in time", code="transfer.timeout") from error
            finally:
                self._waiting.discard(waiting)
        if self.closed:
            raise Unreachable("it was closed")
        if isinstance(self.says, Exception):
            raise self.says
        return self.says

    def close(self) -> None:
        """Give up what waits."""
        self.closed = True
        self.go_on()
