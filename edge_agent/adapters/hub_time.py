"""The hub's word on the time, as `edge_agent.update_ports.TimeSource`: one request, checked in the verifier child.

Rules of this file: each question has a nonce of its own, so an answer from before is no answer; the request goes over
a context without dates (tls.py) and shows no certificate; the core does not look into what came.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Final

import msgspec

from edge_agent.adapters.fetcher import HubFetcher
from edge_agent.adapters.verifier import LiveVerifier
from shared.ids import DeviceId
from shared.limits import MAX_TIME_ANSWER_BYTES
from shared.release import Floors

NONCE_BYTES: Final = 32


class HubTime:
    """`TimeSource` on a fetcher and a verifier."""

    def __init__(
        self, *, fetcher: HubFetcher, verifier: LiveVerifier, device: DeviceId, random: Callable[[int], bytes]
    ) -> None:
        """
        Args:
            fetcher: over `tls.undated_context`.
            verifier: checks the answer.
            device: the name on this device's certificate.
            random: so many unpredictable bytes.
        """
        self._fetcher = fetcher
        self._verifier = verifier
        self._device = device
        self._random = random

    async def ask(self, *, floors: Floors) -> int:
        """What the hub's clock says; raises as `update_ports.TimeSource` says."""
        nonce = base64.urlsafe_b64encode(self._random(NONCE_BYTES)).rstrip(b"=").decode()
        question = {"nonce": nonce, "device": self._device, "root": await self._verifier.root_version()}
        answer = await self._fetcher.ask("/v1/time", msgspec.json.encode(question), max_bytes=MAX_TIME_ANSWER_BYTES)
        return await self._verifier.attest(answer, nonce=nonce, floors=floors)
