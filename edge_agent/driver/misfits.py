"""Releases that do not fit this device: said once for each, although an assignment is offered again and again."""

from __future__ import annotations

import logging
from collections.abc import Callable

from edge_agent.core.variants import Misfit
from shared.ids import FamilyName
from shared.release import VerifiedModel

logger = logging.getLogger(__name__)


class Misfits:
    """What was said already, by family."""

    def __init__(self, note: Callable[[str, dict[str, str]], None]) -> None:
        """`note` keeps an event for the hub."""
        self._note = note
        self._said: dict[FamilyName, str] = {}

    def say(self, model: VerifiedModel, misfit: Misfit) -> None:
        """Tell people and the hub why this release does not run here."""
        family = model.manifest.family
        if self._said.get(family) == model.manifest_digest:
            return
        self._said[family] = model.manifest_digest
        logger.warning("release does not fit this device", extra={"family": family, "why": misfit.reason})
        detail = {"family": family, "version": model.manifest.version, "message": misfit.reason}
        self._note("release.misfit", detail)
