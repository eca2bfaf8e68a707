"""Model hosts without processes: what a script says they answer, with the same refusals as the real ones."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from edge_agent.ports import HostAnswer, HostReady
from shared.errors import HostLost, ModelError
from shared.inference import TensorHead, check_inputs
from shared.model import Manifest, Variant

Script = Callable[[Manifest, Variant, tuple[TensorHead, ...], bytes], HostAnswer]
"""Answers a request; may raise ModelError."""


class FakeHosts:
    """`ports.Hosts` in memory.

    Attributes:
        started: every host that was started, in order.
        fail_next: raised by the next `start` instead of starting.
        agreement: what hosts started from now on say of their golden check; below the manifest's bound they refuse.
    """

    def __init__(self, script: Script) -> None:
        self._script = script
        self.started: list[FakeHost] = []
        self.fail_next: ModelError | None = None
        self.agreement = 1.0

    async def start(
        self, *, manifest: Manifest, variant: Variant, model_fd: int, golden_fd: int, on_lost: Callable[[str], None]
    ) -> tuple[FakeHost, HostReady]:
        """Start a host that answers by the script; closes both descriptors."""
        os.close(model_fd)
        os.close(golden_fd)
        await asyncio.sleep(0)
        failure, self.fail_next = self.fail_next, None
        if failure is not None:
            raise failure
        if self.agreement < manifest.golden.min_agreement:
            raise ModelError("the model gave other answers than recorded", code="model.golden")
        host = FakeHost(self._script, manifest, variant, pid=10_000 + len(self.started), on_lost=on_lost)
        self.started.append(host)
        return host, HostReady(agreement=self.agreement, load_ms=1, rss_bytes=1)


class FakeHost:
    """`ports.ModelHost` in memory.

    Attributes:
        healthy: what `probe` answers.
        hang: while set, requests get no answer.
        deadlines_ms: what each request gave.
    """

    def __init__(
        self, script: Script, manifest: Manifest, variant: Variant, *, pid: int, on_lost: Callable[[str], None]
    ) -> None:
        self._script = script
        self.manifest = manifest
        self.variant = variant
        self._pid = pid
        self._on_lost = on_lost
        self._pending: set[asyncio.Future[None]] = set()
        self.healthy = True
        self.hang = False
        self.deadlines_ms: list[int] = []
        self.stopped = False

    @property
    def pid(self) -> int:
        """A number no process has."""
        return self._pid

    async def infer(
        self, inputs: tuple[TensorHead, ...], payload: bytes | bytearray | memoryview, *, deadline_ms: int
    ) -> HostAnswer:
        """Answer by the script."""
        check_inputs(self.manifest.signature, inputs, len(payload))
        if self.stopped:
            raise HostLost("the model host is not running")
        self.deadlines_ms.append(deadline_ms)
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pending.add(waiting)
        try:
            if not self.hang:
                asyncio.get_running_loop().call_soon(_release, waiting)
            async with asyncio.timeout(deadline_ms / 1000):
                await waiting
            return self._script(self.manifest, self.variant, inputs, bytes(payload))
        finally:
            self._pending.discard(waiting)

    async def probe(self) -> bool:
        """As told."""
        if self.stopped:
            raise HostLost("the model host is not running")
        return self.healthy

    async def stop(self) -> None:
        """End without news."""
        self.stopped = True
        self._fail("it was stopped")

    def crash(self, reason: str = "ended by SIGKILL") -> None:
        """End as a killed process does."""
        if not self.stopped:
            self.stopped = True
            self._fail(reason)
            self._on_lost(reason)

    def _fail(self, reason: str) -> None:
        for waiting in self._pending:
            if not waiting.done():
                waiting.set_exception(HostLost(f"the model host ended: {reason}"))


def _release(waiting: asyncio.Future[None]) -> None:
    if not waiting.done():
        waiting.set_result(None)
