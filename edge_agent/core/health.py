"""How slots are told to the hub and to the door: conversions only."""

from __future__ import annotations

from collections.abc import Iterable

from edge_agent.core.slot_values import Phase, Slot
from edge_agent.core.slots import serving
from shared.inference import ModelState
from shared.wire.messages import Reported, RunningModel


def running_model(slot: Slot) -> RunningModel:
    """The slot as the hub sees it."""
    release = serving(slot)
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
    )


def model_state(slot: Slot) -> ModelState:
    """The slot as applications see it."""
    release = serving(slot)
    if release is None:
        return ModelState(
            family=slot.family,
            phase=slot.phase.value,
            candidate=_candidate(slot),
            error_code=slot.error_code,
            error=slot.error,
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
    )


def revision(slots: Iterable[Slot]) -> int:
    """A number that grows with every reported change of any slot; slots are never removed, so it never goes back."""
    return sum(slot.revision for slot in slots)


def reported(
    slots: Iterable[Slot], *, assignment_version: int, queue_records: int = 0, queue_bytes: int = 0, beat: int = 0
) -> Reported:
    """The device's state for the hub; `beat` counts reports sent for other reasons than a slot's change."""
    states = sorted(slots, key=lambda slot: slot.family)
    return Reported(
        revision=revision(states) + beat,
        assignment_version=assignment_version,
        models=tuple(running_model(slot) for slot in states),
        queue_records=queue_records,
        queue_bytes=queue_bytes,
    )


def _candidate(slot: Slot) -> str:
    """The version on its way in; one on its way out is not a candidate any more."""
    if slot.candidate is None or slot.phase is Phase.ROLLING_BACK:
        return ""
    return slot.candidate.manifest.version
