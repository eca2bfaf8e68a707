"""Starts model hosts, talks to them, notices when one is lost, and leaves none behind.

Rules:
- A host answers one request at a time. At most two requests are on the way to it, so that it never idles between
  them; the others wait here, where one whose deadline has passed can be dropped before it costs anything.
- The end of the stream is the end of the host: it is killed if need be, reaped, and everybody who waits gets HostLost.
- A host that takes longer than `stuck_ms` over one request, or more memory than its budget, is killed.

Not here: the process itself (children.py), what runs inside it (edge_agent/host), and when to start or swap hosts
(edge_agent/core/slots.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from edge_agent.adapters.children import Child, spawn
from edge_agent.adapters.streams import FrameLink
from edge_agent.framing import Buffer
from edge_agent.host import protocol
from edge_agent.ports import HostAnswer, HostReady
from shared import limits
from shared.clock import Clock
from shared.errors import HostLost, InputRefused, ModelError, OutriderError, ProtocolViolation
from shared.inference import TensorHead, check_inputs, tensor_bytes
from shared.model import Manifest, Signature, Variant, encode_manifest

logger = logging.getLogger(__name__)

_WINDOW: Final = 2
_GRACE_S: Final = 2.0
_WATCH_S: Final = 1.0


class HostOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How hosts are started and when they are given up.

    Attributes:
        python: the interpreter.
        threads: threads of the runtime per host.
        memory_bytes: resident size beyond which a host is killed; 0 for no limit.
        start_ms: a host that is not ready by then is killed.
        stuck_ms: a host that takes longer over one request is killed.
        niceness: added to the core's, 0 to 19.
    """

    python: str = sys.executable
    threads: int = 1
    memory_bytes: int = 0
    start_ms: int = 30_000
    stuck_ms: int = 10_000
    niceness: int = 0


class LiveHosts:
    """Starts model hosts as child processes; implements ports.Hosts."""

    def __init__(self, *, directory: Path, clock: Clock, options: HostOptions | None = None) -> None:
        """Keep process ids in `directory`, which is made if it is missing."""
        self._directory = directory
        self._clock = clock
        self._options = options or HostOptions()

    async def start(
        self, *, manifest: Manifest, variant: Variant, model_fd: int, golden_fd: int, on_lost: Callable[[str], None]
    ) -> tuple[LiveHost, HostReady]:
        """Start a child, load, warm up and check; closes both descriptors. Raises ModelError or HostLost."""
        began_ms = self._clock.mono_ms()
        options = self._options
        try:
            process, link, record = spawn(
                (options.python, "-I", "-X", "no_debug_ranges", "-m", "edge_agent.host"),
                directory=self._directory,
                descriptors=(model_fd, golden_fd),
                arguments=(str(options.niceness),),
            )
        finally:
            os.close(model_fd)
            os.close(golden_fd)
        host = LiveHost(process=process, record=record, signature=manifest.signature, options=options, on_lost=on_lost)
        try:
            await host.attach(link)
            loaded = await host.load(manifest, variant)
        except BaseException:  # a cancelled start must not leave its child behind
            await host.kill("it was given up while starting")
            raise
        if loaded.network:
            logger.warning("the kernel leaves model hosts their network", extra={"pid": process.pid})
        load_ms = self._clock.mono_ms() - began_ms
        return host, HostReady(agreement=loaded.agreement, load_ms=load_ms, rss_bytes=loaded.rss_bytes)


class _Asked:
    """One request on its way: a Run with its payload, or a Probe."""

    __slots__ = ("answer", "header", "id", "payload")

    def __init__(self, request: int, header: bytes, payload: tuple[Buffer, ...]) -> None:
        self.id = request
        self.header = header
        self.payload = payload
        self.answer: asyncio.Future[HostAnswer | bool] = asyncio.get_running_loop().create_future()


class LiveHost:
    """One child process with one model in it; implements ports.ModelHost."""

    def __init__(
        self,
        *,
        process: subprocess.Popen[bytes],
        record: Path,
        signature: Signature,
        options: HostOptions,
        on_lost: Callable[[str], None],
    ) -> None:
        loop = asyncio.get_running_loop()
        self._loop = loop
        self._child = Child(process=process, record=record, on_gone=self._on_gone)
        self._signature = signature
        self._options = options
        self._on_lost = on_lost
        self._link: FrameLink | None = None
        self._ready: asyncio.Future[protocol.Loaded] = loop.create_future()
        self._waiting: deque[_Asked] = deque()
        self._running: deque[_Asked] = deque()
        self._busy_since: float | None = None
        self._last_id = 0
        self._served = False
        self._stopping = False
        self._watch: asyncio.TimerHandle | None = None

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._child.pid

    def rss_bytes(self) -> int:
        """The child's resident size now; 0 once it is gone."""
        return self._child.rss_bytes()

    async def attach(self, link: socket.socket) -> None:
        """Take over the core's end of the socket pair and start watching."""
        frames = FrameLink(on_frame=self._on_frame, on_refused=self._on_refused, on_end=self._child.reap)
        try:
            await self._loop.create_unix_connection(lambda: frames, sock=link)
        except BaseException:  # cancellation included: until a transport has it, the socket is ours to close
            link.close()
            raise
        self._link = frames
        self._watch_once()

    async def load(self, manifest: Manifest, variant: Variant) -> protocol.Loaded:
        """Have the model loaded and checked; raises ModelError or HostLost."""
        load = protocol.Load(variant=variant.name, threads=self._options.threads)
        self._send(protocol.encode(load), (encode_manifest(manifest),))
        try:
            async with asyncio.timeout(self._options.start_ms / 1000):
                return await asyncio.shield(self._ready)
        except TimeoutError as error:
            raise ModelError(
                f"the model was not ready after {self._options.start_ms} ms",
                code="model.load_timeout",
                hint="give the device a smaller variant, or its hosts more time to start",
            ) from error

    async def infer(self, inputs: tuple[TensorHead, ...], payload: Buffer, *, deadline_ms: int) -> HostAnswer:
        """Run the model; raises InputRefused, ModelError, HostLost; TimeoutError past the deadline."""
        rows = check_inputs(self._signature, inputs, len(payload))
        self._last_id += 1
        run = protocol.Run(id=self._last_id, inputs=inputs, rows=rows)
        answer = await self._ask(_Asked(run.id, protocol.encode(run), (payload,)), deadline_ms / 1000)
        assert isinstance(answer, HostAnswer)
        return answer

    async def probe(self) -> bool:
        """Run a golden sample and say whether the answer is the recorded one; raises as `infer` does."""
        self._last_id += 1
        probe = protocol.Probe(id=self._last_id)
        return await self._ask(_Asked(probe.id, protocol.encode(probe), ()), self._options.stuck_ms / 1000) is True

    async def stop(self) -> None:
        """Drain, end and reap the child; kills it after a grace period. Safe to call twice."""
        self._stopping = True
        wanted = [asked.answer for asked in (*self._running, *self._waiting) if not asked.answer.done()]
        unanswered = (await asyncio.wait(wanted, timeout=_GRACE_S))[1] if wanted else set()
        if not unanswered and not self._child.is_gone:
            self._send(protocol.encode(protocol.Stop()), ())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_GRACE_S):
                    await self._child.wait()
        await self.kill("it was stopped")

    async def kill(self, reason: str) -> None:
        """End the child at once and wait until it is reaped."""
        self._stopping = True
        self._child.condemn(reason)
        if self._link is None or not self._link.is_open:
            self._child.reap()
        await self._child.wait()

    async def _ask(self, asked: _Asked, seconds: float) -> HostAnswer | bool:
        if self._stopping or self._child.is_gone:
            raise HostLost("the model host is not running", hint="ask again: another one is started")
        if len(self._waiting) >= limits.MAX_WAITING_REQUESTS:
            error = ModelError(f"{len(self._waiting)} requests wait for the model", code="overload", hint="ask later")
            error.retry = True
            raise error
        timer = self._loop.call_later(seconds, _expire, asked)
        self._waiting.append(asked)
        self._pump()
        try:
            return await asked.answer
        finally:
            timer.cancel()
            # What nobody waits for any more shall hold neither a place nor its payload.
            with contextlib.suppress(ValueError):
                self._waiting.remove(asked)

    def _pump(self) -> None:
        while self._waiting and len(self._running) < _WINDOW:
            asked = self._waiting.popleft()
            if asked.answer.done():
                continue
            if not self._running:
                self._busy_since = self._loop.time()
            self._running.append(asked)
            self._send(asked.header, asked.payload)
        if not self._running and not self._waiting:
            self._busy_since = None

    def _send(self, header: bytes, payload: tuple[Buffer, ...]) -> None:
        if self._link is not None:
            self._link.send(header, payload)

    def _on_frame(self, header: bytes, payload: bytearray) -> None:
        try:
            reply = protocol.decode_from_host(header)
            self._take(reply, payload)
        except ProtocolViolation as error:
            self._child.condemn(error.message)

    def _on_refused(self, error: ProtocolViolation) -> None:
        self._child.condemn(error.message)

    def _take(self, reply: protocol.FromHost, payload: bytearray) -> None:
        match reply:
            case protocol.Loaded():
                if not self._ready.done():
                    self._served = True
                    self._ready.set_result(reply)
            case protocol.LoadFailed():
                if not self._ready.done():
                    self._fail_ready(ModelError(reply.message, code=reply.code, hint=reply.hint))
            case protocol.Ran():
                _check_outputs(reply, len(payload))
                answer = HostAnswer(
                    labels=reply.labels, confidences=reply.confidences, outputs=reply.outputs, payload=payload
                )
                self._settle(reply.id, answer)
            case protocol.Probed():
                self._settle(reply.id, reply.agreed)
            case protocol.RunFailed():
                leaf = InputRefused if reply.code == InputRefused.code else ModelError
                self._settle(reply.id, leaf(reply.message, code=reply.code, hint=reply.hint))

    def _settle(self, request: int, result: HostAnswer | bool | OutriderError) -> None:
        if not self._running or self._running[0].id != request:
            raise ProtocolViolation("the model host answered what it was not asked", code="protocol.host")
        future = self._running.popleft().answer
        self._busy_since = self._loop.time()
        self._pump()
        if future.done():
            return
        if isinstance(result, OutriderError):
            future.set_exception(result)
        else:
            future.set_result(result)

    def _watch_once(self) -> None:
        period = min(_WATCH_S, self._options.stuck_ms / 4000)
        self._watch = self._loop.call_later(period, self._watch_once)
        rss, budget = self.rss_bytes(), self._options.memory_bytes
        if budget and rss > budget:
            self._child.condemn(f"it took {rss} bytes of memory, {budget} are allowed")
        since = self._busy_since
        if since is not None and (self._loop.time() - since) * 1000 > self._options.stuck_ms:
            self._child.condemn(f"it worked on one request for more than {self._options.stuck_ms} ms")

    def _on_gone(self, reason: str) -> None:
        if self._watch is not None:
            self._watch.cancel()
        if self._link is not None:
            self._link.abort()
        for asked in (*self._running, *self._waiting):
            if not asked.answer.done():
                asked.answer.set_exception(_lost(reason))
        self._running.clear()
        self._waiting.clear()
        self._fail_ready(_lost(reason))
        if self._served and not self._stopping:
            logger.warning("model host lost", extra={"pid": self.pid, "reason": reason})
            self._on_lost(reason)

    def _fail_ready(self, error: ModelError) -> None:
        if not self._ready.done():
            self._ready.set_exception(error)
            self._ready.exception()  # nobody may be waiting any more


def _check_outputs(reply: protocol.Ran, payload_bytes: int) -> None:
    """Raise ProtocolViolation unless the answer's parts agree: the process that made it held somebody's model."""
    regular = all(size >= 0 for head in reply.outputs for size in head.shape)
    total = sum(tensor_bytes(head) for head in reply.outputs)
    if not regular or total != payload_bytes or len(reply.labels) != len(reply.confidences):
        raise ProtocolViolation("the model host's answer does not fit its header", code="protocol.host")


def _lost(reason: str) -> HostLost:
    return HostLost(f"the model host ended: {reason}", hint="ask again: another one is started")


def _expire(asked: _Asked) -> None:
    if not asked.answer.done():
        asked.answer.set_exception(TimeoutError("the model's answer did not come in time"))
