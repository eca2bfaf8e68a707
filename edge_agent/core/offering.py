"""What an accepted assignment comes to for the slots: offers, withdrawals, and why a whole set is not taken in.

Rules of this file:
1. A set is taken in as a whole or not at all: what stands against one member is a reason for all.
2. The new hosts of a set and all hosts that serve are loaded at the same time. Where that is more than the profile
   allows, the set is refused before anything is fetched; a switch of one half is not a way out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from edge_agent.core.sets import ForFamily, States
from edge_agent.core.slot_values import Member, Offered, Slot, Withdrawn
from edge_agent.core.variants import Misfit
from shared.ids import Digest, FamilyName
from shared.limits import MIB
from shared.model import Variant
from shared.profile import MemoryBudget
from shared.release import Patch, VerifiedAssignment, VerifiedModel

AGENT_BYTES: Final = 64 * MIB
"""What the agent and a short-lived child take beside the model hosts."""


def offers(
    verified: VerifiedAssignment, chosen: Mapping[FamilyName, Variant | Misfit], states: States, memory: MemoryBudget
) -> list[ForFamily]:
    """The events for the slots, which are to be decided on as one.

    Args:
        chosen: for each family of the assignment the variant to run, or why none fits.
        states: every slot of the device.
        memory: the profile's.
    """
    models = {model.manifest.family: model for model in verified.models}
    together: dict[FamilyName, tuple[Member, ...]] = {}
    refusals: dict[FamilyName, tuple[str, str]] = {}
    for families in verified.assignment.together:
        named = [models[family] for family in sorted(families) if family in models]
        members = tuple(Member(family=m.manifest.family, manifest=m.manifest_digest) for m in named)
        refusal = _against(named, chosen, states, memory, forced=frozenset(verified.assignment.force))
        together |= {member.family: members for member in members if len(members) > 1}
        refusals |= {member.family: refusal for member in members if refusal is not None}
    events: list[ForFamily] = []
    for family, model in models.items():
        variant = chosen[family]
        if isinstance(variant, Misfit):
            continue
        code, why = refusals.get(family, ("", ""))
        offered = Offered(
            model=model,
            variant=variant.name,
            assignment_version=verified.assignment.version,
            force=family in verified.assignment.force,
            together=together.get(family, ()),
            refusal_code=code,
            refusal=why,
            patches=_patches_to(verified, variant.file.digest, model.manifest.golden.file.digest),
        )
        events.append((family, offered))
    return events + [(family, Withdrawn()) for family in states if family not in models]


def _patches_to(verified: VerifiedAssignment, *results: Digest) -> tuple[Patch, ...]:
    return tuple(patch for patch in verified.assignment.patches if patch.result in results)


def _against(
    named: list[VerifiedModel],
    chosen: Mapping[FamilyName, Variant | Misfit],
    states: States,
    memory: MemoryBudget,
    *,
    forced: frozenset[FamilyName],
) -> tuple[str, str] | None:
    """Why this set is not taken in: a code and words; None when nothing stands against it."""
    new_bytes = 0
    for model in named:
        family, variant = model.manifest.family, chosen[model.manifest.family]
        slot = states.get(family)
        if _runs(slot, model.manifest_digest):
            continue
        if isinstance(variant, Misfit):
            return "set.member_failed", f"{family}: release.misfit: {variant.reason}"
        if slot is not None and model.manifest_digest in slot.quarantine and family not in forced:
            return "set.member_failed", f"{family}: release.quarantined: this release failed here before"
        new_bytes += _resident(variant, memory)
    if new_bytes == 0:
        return None
    serving = (slot.active.served for slot in states.values() if slot.active is not None)
    all_bytes = AGENT_BYTES + new_bytes + sum(_resident(variant, memory) for variant in serving)
    if all_bytes <= memory.total_bytes:
        return None
    return (
        "set.no_room",
        f"all old and new hosts together need {all_bytes // MIB} MiB, {memory.total_bytes // MIB} MiB are allowed",
    )


def _runs(slot: Slot | None, digest: Digest) -> bool:
    return slot is not None and slot.active is not None and slot.active.key == digest


def _resident(variant: Variant, memory: MemoryBudget) -> int:
    """Of a variant whose size is not known, the most that its host is let have."""
    return variant.ram_bytes or memory.host_bytes
