"""`Renewer` in a child process, which is who makes keys, speaks to the hub and keeps the new files.

This module loads no cryptography. Not here: what the child does (edge_agent/renewal.py).
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from edge_agent.core.trusted_time import Basis
from edge_agent.ports import CertificateLife
from shared.errors import OutriderError, ProtocolViolation
from shared.limits import KIB

DEADLINE_S: Final = 75.0
"""Longer than the child's own deadlines together: two questions after two handshakes."""
MAX_SAID_BYTES: Final = 64 * KIB
_REAP_S: Final = 5.0


class _Said(msgspec.Struct, frozen=True):
    not_before_ms: int = 0
    not_after_ms: int = 0
    authorities: str = ""
    code: str = ""
    message: str = ""
    hint: str = ""


class LiveRenewer:
    """`Renewer`: one child for each question."""

    def __init__(
        self,
        *,
        state_dir: Path,
        now_ms: Callable[[], int],
        basis: Callable[[], Basis],
        hub_url: str = "",
        command: tuple[str, ...] = (sys.executable, "-I", "-m", "edge_agent.renewal"),
    ) -> None:
        """
        Args:
            state_dir: the agent's.
            now_ms: the trusted time, by which the child judges the hub's certificate and ours.
            basis: on what that rests.
            hub_url: where to ask; empty for where the hub said that it is.
            command: what starts the child.
        """
        self._now_ms = now_ms
        self._basis = basis
        self._state_dir = state_dir.absolute()
        self._hub_url = hub_url
        self._command = command

    async def look(self) -> CertificateLife:
        """As `ports.Renewer` says."""
        return await self._run("--look", str(self._state_dir), str(os.getpid()))

    async def renew(self) -> CertificateLife:
        """As `ports.Renewer` says."""
        rest = (self._hub_url,) if self._hub_url else ()
        return await self._run(str(self._state_dir), str(os.getpid()), str(self._now_ms()), self._basis(), *rest)

    async def follow(self) -> str:
        """The CAs to trust because a CA of ours vouches for them, PEM; empty where the hub publishes no such.

        Nothing is kept: a renewal brings them for good. Raises OutriderError when the hub or the child does not answer.
        """
        rest = (self._hub_url,) if self._hub_url else ()
        return (await self._ask("--follow", str(self._state_dir), str(os.getpid()), *rest)).authorities

    async def _run(self, *arguments: str) -> CertificateLife:
        said = await self._ask(*arguments)
        return CertificateLife(not_before_ms=said.not_before_ms, not_after_ms=said.not_after_ms)

    async def _ask(self, *arguments: str) -> _Said:
        process = self._start(arguments)
        try:
            data = await asyncio.to_thread(_read, process)
        except subprocess.TimeoutExpired as error:
            raise OutriderError("the renewal did not end in time", code="renew.timeout") from error
        finally:
            process.kill()
            await asyncio.to_thread(_reap, process)
        return _understand(data)

    def _start(self, arguments: tuple[str, ...]) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(
                [*self._command, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                cwd="/",
                env={"LC_ALL": "C.UTF-8"},
            )
        except OSError as error:
            raise OutriderError(
                f"the renewal cannot be started: {error}",
                code="renew.start",
                hint=f"check that {self._command[0]} runs and that memory is left",
            ) from error


def _read(process: subprocess.Popen[bytes]) -> bytes:
    data, _ = process.communicate(timeout=DEADLINE_S)
    return data[: MAX_SAID_BYTES + 1]


def _reap(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(timeout=_REAP_S)
    except subprocess.TimeoutExpired:
        return  # it is killed; the kernel is not done with it
    if process.stdout is not None:
        process.stdout.close()


def _understand(data: bytes) -> _Said:
    try:
        said = msgspec.json.decode(data, type=_Said)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ProtocolViolation("the renewal ended without a word", code="renew.lost") from error
    if said.code:
        raise OutriderError(said.message, code=said.code, hint=said.hint)
    return said
