"""The device's certificate: has it renewed in time and lets every connection use the new one.

Rules: what to do when is decided in edge_agent/core/renewal.py, by the trusted time; nothing that fails here stops the
agent, which serves without a hub for as long as it must.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable

from edge_agent.core import renewal
from edge_agent.core.link import Reconnect
from edge_agent.core.renewal import Failed, Looked, Renewal, RenewalEvent, Renewed
from edge_agent.core.trusted_time import WRONG_DATES
from edge_agent.driver.events import ForLink, ForRenewal, Noted, TimeDoubted
from edge_agent.driver.loop import Loop
from edge_agent.ports import CertificateLife, Renewer
from shared.errors import OutriderError

logger = logging.getLogger(__name__)


class Renewals:
    """The driver's part that keeps the certificate alive.

    Args:
        now_ms: the trusted time.
        loop: the agent's.
        renewer: who renews.
        life: the certificate's dates; zeros where nobody has looked into it yet.
        adopt: makes every later connection use the certificate that is on disk now; raises OutriderError.
    """

    def __init__(
        self,
        *,
        now_ms: Callable[[], int],
        loop: Loop,
        renewer: Renewer,
        life: CertificateLife,
        adopt: Callable[[], None],
    ) -> None:
        self._now_ms = now_ms
        self._inbox, self._works, self._timers = loop.inbox, loop.works, loop.timers
        self._renewer = renewer
        self._adopt = adopt
        self._renewal = Renewal(
            not_before_ms=life.not_before_ms, not_after_ms=life.not_after_ms, spread=random.random()
        )

    @property
    def expires_ms(self) -> int:
        """When the certificate ends; 0 while nobody has looked into it."""
        return self._renewal.not_after_ms

    @property
    def due_ms(self) -> int:
        """When it is to be renewed; 0 while nobody has looked into it."""
        return renewal.due_ms(self._renewal) if self.expires_ms else 0

    @property
    def trouble(self) -> tuple[str, str]:
        """What went wrong last and what to do about it; empty when nothing did."""
        return self._renewal.message, self._renewal.hint

    def start(self) -> None:
        """Begin to look at the clock."""
        if self.expires_ms:
            self._look_now()
        else:
            self._works.start("renewal", self._examine())

    def time_changed(self) -> None:
        """Look at the clock now: the hub has told the time."""
        if self.expires_ms:
            self._look_now()

    def handle(self, event: RenewalEvent) -> None:
        """Let the machine decide and carry out what it says."""
        if isinstance(event, Looked):
            event = Looked(now_ms=self._now_ms())  # the one in a timer is of when it was set
        decision = renewal.decide(self._renewal, event)
        self._renewal = decision.state
        for effect in decision.effects:
            match effect:
                case renewal.Ask():
                    self._works.start("renewal", self._renew())
                case renewal.Adopt():
                    self._switch()
                case renewal.StartTimer(delay_ms):
                    self._timers.start("renewal", delay_ms, ForRenewal(Looked(now_ms=0)))
                case renewal.NoteRefusal(code, message):
                    logger.error("the hub does not renew the certificate", extra={"code": code, "why": message})
                    self._inbox.post(Noted("certificate.refused", {"code": code, "message": message}))

    def _look_now(self) -> None:
        self._inbox.post(ForRenewal(Looked(now_ms=0)))

    def _switch(self) -> None:
        try:
            self._adopt()
        except OutriderError as error:
            # It is on disk and counts; the next start uses it, and until then the old one may still do.
            logger.error("the new certificate is not used yet", extra={"code": error.code, "why": error.message})
            return
        logger.info("certificate renewed", extra={"expires_ms": self.expires_ms})
        self._inbox.post(Noted("certificate.renewed", {"expires_ms": str(self.expires_ms)}))
        self._inbox.post(ForLink(Reconnect()))

    async def _examine(self) -> None:
        try:
            life = await self._renewer.look()
        except OutriderError as error:
            logger.error("the certificate cannot be looked into", extra={"code": error.code, "why": error.message})
            return
        self._renewal = Renewal(
            not_before_ms=life.not_before_ms, not_after_ms=life.not_after_ms, spread=random.random()
        )
        self._look_now()

    async def _renew(self) -> None:
        try:
            life = await self._renewer.renew()
        except OutriderError as error:
            if error.code != self._renewal.code:
                logger.warning("certificate not renewed", extra={"code": error.code, "why": error.message})
            if error.code in (WRONG_DATES, renewal.WRONG_LIFE):
                self._inbox.post(TimeDoubted())
            failed = Failed(code=error.code, message=error.message, hint=error.hint, jitter=random.random())
            self._inbox.post(ForRenewal(failed))
        else:
            renewed = Renewed(
                not_before_ms=life.not_before_ms,
                not_after_ms=life.not_after_ms,
                spread=random.random(),
                now_ms=self._now_ms(),
            )
            self._inbox.post(ForRenewal(renewed))
