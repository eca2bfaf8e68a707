"""How slots are told to the hub and to the door: conversions only.

`route` is the key of the release that answers now: the one last switched to, if its host is up, else None.
"""

from __future__ import annotations

from edge_agent.core.slot_values import Installed, Phase, Slot
from shared.inference import ModelState
from shared.wire.messages import RunningModel


def running_model(slot: Slot, route: str | None) -> RunningModel:
    """The slot as the hub sees it."""
    release = _answering(slot, route)
    return RunningModel(
        family=slot.family,
        phase=slot.phase.value,
        version=release.manifest.version if release else "",
        variant=release.variant if release else "",
        digest=release.served.file.digest if release else "",
        manifest=release.manifest_digest if release else "",
        candidate=_candidate(slot),
        error_code=slot.error_code,
        error=slot.error,
        failed=slot.failed,
    )


def model_state(slot: Slot, route: str | None) -> ModelState:
    """The slot as applications see it."""
    release = _answering(slot, route)
    if release is None:
        return ModelState(
            family=slot.family,
            phase=slot.phase.value,
            candidate=_candidate(slot),
            error_code=slot.error_code,
            error=slot.error,
            together=_together(slot),
        )
    return ModelState(
        family=slot.family,
        phase=slot.phase.value,
        version=release.manifest.version,
        variant=release.variant,
        digest=release.served.file.digest,
        candidate=_candidate(slot),
        error_code=slot.error_code,
        error=slot.error,
        signature=release.manifest.signature,
        labels=release.manifest.labels,
        together=_together(slot),
    )


def _answering(slot: Slot, route: str | None) -> Installed | None:
    """The release that the route names, if the slot knows it."""
    known = (slot.candidate, slot.active)
    return next((release for release in known if release is not None and release.key == route), None)


def _together(slot: Slot) -> tuple[str, ...]:
    """The other families of the set that is on its way, else of the one that was committed."""
    families = [member.family for member in slot.together] or slot.changed_with
    return tuple(sorted(family for family in families if family != slot.family))


def _candidate(slot: Slot) -> str:
    """The version on its way in; one on its way out is not a candidate any more."""
    if slot.candidate is None or slot.phase is Phase.ROLLING_BACK:
        return ""
    return slot.candidate.manifest.version
