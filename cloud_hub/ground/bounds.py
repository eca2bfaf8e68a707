"""Bounds around every request: how large its body may be, how long it may take; and its figures.

A body is read in full before the application sees the request, up to `MAX_JSON_BODY_BYTES`. Paths below one of the
`streamed` prefixes are exempt from both bounds: they watch their own.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cloud_hub.ground.metrics import Metrics
from cloud_hub.ground.problems import problem
from shared import limits
from shared.clock import Clock

DEADLINE_S: Final = 30.0


class Bounds:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, clock: Clock, streamed: tuple[str, ...]) -> None:
        self._app = app
        self._metrics = metrics
        self._clock = clock
        self._streamed = streamed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request within its bounds."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began_ms = self._clock.mono_ms()
        answer = _Answer(send)
        try:
            if str(scope["path"]).startswith(self._streamed):
                await self._app(scope, receive, answer.send)
            else:
                await self._bounded(scope, receive, answer)
        finally:
            route = str(getattr(scope.get("route"), "path", "none"))
            self._metrics.requests.labels(_method(scope), route, str(answer.status)).inc()
            self._metrics.request_seconds.labels(route).observe((self._clock.mono_ms() - began_ms) / 1000)

    async def _bounded(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        try:
            async with asyncio.timeout(DEADLINE_S):
                body = await _read_body(scope, receive)
                if body is None:
                    refusal = problem(
                        status=413,
                        code="protocol.too_large",
                        detail=f"a request's body holds at most {limits.MAX_JSON_BODY_BYTES} bytes",
                        hint="send less at once; models and golden files go to /v1/blobs",
                    )
                    await refusal(scope, receive, answer.send)
                    return
                await self._app(scope, _replay(body, receive), answer.send)
        except TimeoutError:
            if answer.status:
                raise
            late = problem(
                status=504, code="timeout", detail=f"no answer within {DEADLINE_S:.0f} s", hint="try again later"
            )
            await late(scope, receive, answer.send)


class _Answer:
    """Notes the status of what is sent."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = int(message["status"])
        await self._send(message)


async def _read_body(scope: Scope, receive: Receive) -> bytes | None:
    """The whole body; None when it is too large."""
    for name, value in scope["headers"]:
        if name == b"content-length" and (not value.isdigit() or int(value) > limits.MAX_JSON_BODY_BYTES):
            return None
    chunks: list[bytes] = []
    length = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return b"".join(chunks)
        chunk: bytes = message.get("body", b"")
        chunks.append(chunk)
        length += len(chunk)
        if length > limits.MAX_JSON_BODY_BYTES:
            return None
        if not message.get("more_body", False):
            return b"".join(chunks)


def _replay(body: bytes, receive: Receive) -> Receive:
    waiting: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return waiting.pop() if waiting else await receive()

    return again


def _method(scope: Scope) -> str:
    method = str(scope["method"])
    return method if method in {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"} else "other"
