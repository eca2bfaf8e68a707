"""The hub's word on the time, as `edge_agent.update_ports.TimeSource`: one request, checked in the verifier child.

Rules of this file: each question has a nonce of its own, so an answer from before is no answer; the request goes over
a context without dates (tls.py) and shows no certificate; a hub that has changed its CA while this device slept is
believed by its link, as a renewal believes it, because the renewal itself needs the time; the core does not look into
what came.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec

from edge_agent.adapters.fetcher import FOREIGN_CERTIFICATE, HubFetcher
from edge_agent.adapters.tls import undated_trust
from edge_agent.adapters.verifier import LiveVerifier
from shared.errors import OutriderError, TransferRefused
from shared.ids import DeviceId
from shared.limits import MAX_TIME_ANSWER_BYTES
from shared.release import Floors

logger = logging.getLogger(__name__)

NONCE_BYTES: Final = 32
PATH: Final = "/v1/time"


class HubTime:
    """`TimeSource` on a fetcher and a verifier."""

    def __init__(
        self,
        *,
        fetcher: HubFetcher,
        follow: Callable[[], Awaitable[str]],
        verifier: LiveVerifier,
        device: DeviceId,
        random: Callable[[int], bytes],
    ) -> None:
        """
        Args:
            fetcher: over `tls.undated_context`.
            follow: the CAs that follow from ours, as `LiveRenewer.follow` says.
            verifier: checks the answer.
            device: the name on this device's certificate.
            random: so many unpredictable bytes.
        """
        self._fetcher = fetcher
        self._follow = follow
        self._verifier = verifier
        self._device = device
        self._random = random

    async def ask(self, *, floors: Floors) -> int:
        """What the hub's clock says; raises as `update_ports.TimeSource` says."""
        nonce = base64.urlsafe_b64encode(self._random(NONCE_BYTES)).rstrip(b"=").decode()
        question = {"nonce": nonce, "device": self._device, "root": await self._verifier.root_version()}
        answer = await self._answer(msgspec.json.encode(question))
        return await self._verifier.attest(answer, nonce=nonce, floors=floors)

    async def _answer(self, question: bytes) -> bytes:
        try:
            return await self._fetcher.ask(PATH, question, max_bytes=MAX_TIME_ANSWER_BYTES)
        except TransferRefused as error:
            if error.code != FOREIGN_CERTIFICATE or not await self._follows():
                raise
        return await self._fetcher.ask(PATH, question, max_bytes=MAX_TIME_ANSWER_BYTES)

    async def _follows(self) -> bool:
        """Whether there are more CAs to believe now, until a renewal brings them for good."""
        try:
            wider = await self._follow()
        except OutriderError as error:
            logger.warning("no link to another CA", extra={"code": error.code, "why": error.message})
            return False
        if wider:
            self._fetcher.adopt(undated_trust(wider))
        return bool(wider)
