"""Several slots as one: releases of a set serve together, commit together, and go back together.

    change = decide(slots, events)      save every slot of change.slots in one transaction, then the effects in order

A set is a value that each of its candidates carries (`Slot.together`), and nothing else is kept of it: how far it is
follows from its members' states. So there is nothing that a power cut could leave out of step with the slots.

Rules of this file:
1. All members serve their new releases or none does. The switch to them, the commit and every way back change all
   members in one decision, which is one transaction of the ledger and one piece of work without a pause in between.
2. Hosts of a set are loaded once every member has its verified files, so that waiting for a slow link costs no memory.
3. A member that fails takes the others back. Only the one that failed is blamed.
4. A member that already runs the named release is ready, and stays as it is whatever becomes of the others.
5. What was committed in one step is gone back from in one step, or not at all.

Not here: what each slot does (edge_agent/core/slots.py), and whether a set is taken in at all (offering.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec
from msgspec.structs import replace

from edge_agent.core import slots
from edge_agent.core.slot_values import (
    CommitAllowed,
    Effect,
    Event,
    FilesBad,
    Gathered,
    Installed,
    Member,
    NoLongerTrusted,
    OperatorRollback,
    Phase,
    SetFailed,
    SetRolledBack,
    Slot,
    SteppedBack,
    SwitchAllowed,
)
from shared.ids import Digest, FamilyName

States = Mapping[FamilyName, Slot]
ForFamily = tuple[FamilyName, Event]

MAX_EVENTS: Final = 1_000
"""Events that one decision may come to: 16 slots and a few steps each are far below it."""
BY_COUNT: Final = ("release.loads", "release.loops")


class Change(msgspec.Struct, frozen=True):
    """What to save, in one transaction, and what to do then, in order, without a pause."""

    slots: dict[FamilyName, Slot]
    effects: tuple[tuple[FamilyName, Effect], ...]


def decide(states: States, events: Sequence[ForFamily]) -> Change:
    """What these events, which have happened at once, and all that follows from them come to.

    Args:
        states: every slot of the device, one for each family that an event is for.
        events: in order.
    """
    after = dict(states)
    effects: list[tuple[FamilyName, Effect]] = []
    given = deque(events)
    waiting: deque[ForFamily] = deque()
    for _ in range(MAX_EVENTS):
        while not waiting and given:
            # Not before its turn: whom it concerns may hang on what the ones before it have left.
            waiting.extend(_widened(after, *given.popleft()))
        if not waiting:
            waiting.extend(_following(after))
            if not waiting:
                changed = {family: slot for family, slot in after.items() if slot is not states[family]}
                return Change(changed, tuple(effects))
        family, event = waiting.popleft()
        decision = slots.decide(after[family], event)
        after[family] = decision.state
        effects += [(family, effect) for effect in decision.effects]
    raise AssertionError(f"a set runs in a circle: {waiting}")


def can_roll_back(states: States, family: FamilyName) -> bool:
    """Whether OperatorRollback of this family would change anything."""
    slot = states[family]
    if slot.phase is Phase.COMMITTED and slot.changed_with:
        return _goes_back_as_one(states, slot)
    return slots.can_roll_back(slot)


def distrusted(states: States, reasons: Mapping[Digest, tuple[str, str]]) -> tuple[list[ForFamily], frozenset[Digest]]:
    """What is said to the slots of releases that do not hold any more, and all releases that are not served for it.

    Who was committed in one step with such a release is not served either, unless all can go back.

    Args:
        states: every slot of the device.
        reasons: a code and words for each release that does not hold, by the digest of its manifest.
    """
    before: list[ForFamily] = []
    actives: list[ForFamily] = []
    along: list[ForFamily] = []
    withheld = set(reasons)
    for family, slot in states.items():
        for release in (slot.previous, slot.candidate):
            if release is not None and release.manifest_digest in reasons:
                before.append((family, _gone(release, *reasons[release.manifest_digest])))
        if slot.active is None or slot.active.manifest_digest not in reasons:
            continue
        code, why = reasons[slot.active.manifest_digest]
        actives.append((family, _gone(slot.active, code, why)))
        for other in slot.changed_with:
            member = states.get(other)
            if member is None or member.active is None or member.changed_with != slot.changed_with:
                continue
            if member.active.manifest_digest not in reasons:
                withheld.add(member.active.manifest_digest)
                along.append((other, _gone(member.active, "set.member_failed", f"{family}: {code}: {why}")))
    # What is gone back to is judged before what is left, and who is to blame before who goes along.
    return [*before, *actives, *along], frozenset(withheld)


def _gone(release: Installed, code: str, message: str) -> NoLongerTrusted:
    return NoLongerTrusted(key=release.key, code=code, message=message)


def may_warm_up(states: States, family: FamilyName) -> bool:
    """Whether a host of this family may be loaded now, as far as sets go: no host of another set waits, loaded."""
    ready = [slot for slot in states.values() if slot.phase is Phase.READY]
    return all(any(member.family == family for member in slot.together) for slot in ready)


# The ways back


def _widened(states: dict[FamilyName, Slot], family: FamilyName, event: Event) -> list[ForFamily]:
    """The event for everyone whom it concerns: who leaves what was committed in one step takes the others along.

    Where they cannot go along, the release before is out of reach, and nothing serves rather than a mixture.
    """
    slot = states[family]
    if not slot.changed_with or not _leaves_active(slot, event):
        return [(family, event)]
    if not _goes_back_as_one(states, slot):
        if isinstance(event, OperatorRollback):
            return []
        states[family] = replace(slot, previous=None)
        return [(family, event)]
    code, message = _why(event)
    own = event if not isinstance(event, FilesBad) else SetRolledBack(code=code, message=message)
    along = SetRolledBack(code="set.member_failed", message=f"{family}: {code}: {message}")
    return [(family, own), *((other, along) for other in slot.changed_with if other != family)]


def _leaves_active(slot: Slot, event: Event) -> bool:
    match event:
        case OperatorRollback():
            return slot.phase is Phase.COMMITTED
        case NoLongerTrusted(key=key) | FilesBad(key=key, retry=False):
            return slot.active is not None and slot.active.key == key
        case _:
            return False


def _goes_back_as_one(states: States, slot: Slot) -> bool:
    return all(
        (other := states.get(family)) is not None
        and other.phase is Phase.COMMITTED
        and other.changed_with == slot.changed_with
        and other.previous is not None
        for family in slot.changed_with
    )


def _why(event: Event) -> tuple[str, str]:
    match event:
        case NoLongerTrusted(code=code, message=message) | FilesBad(code=code, message=message):
            return code, message
        case _:
            return "operator.rollback", "rolled back by the operator of the device"


# The way forward


def _following(states: States) -> list[ForFamily]:
    """What the members of a set are to be told now; the first set of which there is something to say."""
    ways = (slot.together for slot in states.values() if slot.together and _is_on_its_way(slot))
    for together in dict.fromkeys(ways):
        if said := _said(states, together):
            return said
    return []


def _said(states: States, together: tuple[Member, ...]) -> list[ForFamily]:
    coming = {
        member.family: (states[member.family], member.manifest)
        for member in together
        if _comes(states.get(member.family), member, together)
    }
    missing = [m for m in together if m.family not in coming and not _has(states.get(m.family), m)]
    if missing:
        failed = _failure(states.get(missing[0].family), missing[0])
        return [(family, replace(failed, key=key)) for family, (_, key) in coming.items()]
    phases = {slot.phase for slot, _ in coming.values()}
    if Phase.PROBATION in phases and len(phases) > 1:
        return [(family, SteppedBack(key)) for family, (slot, key) in coming.items() if slot.phase is Phase.PROBATION]
    if phases == {Phase.READY}:
        return [(family, SwitchAllowed(key)) for family, (_, key) in coming.items()]
    if all(slot.trial.passed for slot, _ in coming.values()):
        changed = tuple(sorted(coming))
        return [(m.family, CommitAllowed(key=m.manifest, changed=changed)) for m in together]
    if phases <= {Phase.STAGED, Phase.WARMUP, Phase.READY}:
        return [
            (family, Gathered(key))
            for family, (slot, key) in coming.items()
            if slot.phase is Phase.STAGED and not slot.is_gathered
        ]
    return []


def _is_on_its_way(slot: Slot) -> bool:
    return slot.candidate is not None and slot.phase is not Phase.ROLLING_BACK


def _comes(slot: Slot | None, member: Member, together: tuple[Member, ...]) -> bool:
    """Whether this slot brings the member in, as part of this very set."""
    if slot is None or slot.candidate is None or not _is_on_its_way(slot):
        return False
    return slot.candidate.key == member.manifest and slot.together == together


def _has(slot: Slot | None, member: Member) -> bool:
    """Whether the member's release serves already, committed."""
    if slot is None or slot.active is None:
        return False
    return slot.active.key == member.manifest and slot.phase is not Phase.PROBATION


def _failure(slot: Slot | None, member: Member) -> SetFailed:
    """Who failed and why, for the others; its key is theirs to fill in."""
    code, message = "release.superseded", "it is not on its way any more"
    if slot is not None and slot.failed == member.manifest and slot.error_code:
        code, message = slot.error_code, slot.error
    return SetFailed(
        key="",
        code="set.timeout" if code == "set.timeout" else "set.member_failed",
        message=f"{member.family}: {code}: {message}",
        by_count=code in BY_COUNT,
    )
