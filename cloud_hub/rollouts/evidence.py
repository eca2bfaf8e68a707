"""What the gates of a rollout are given, and what they say: all readings of one look at the fleet.

The comparison is with what each device ran before it was offered the release; devices that still run it are the
control and count as well. Where no device of the rollout ran anything of the family before, there is nothing to
compare with.

Not here: the tests behind the gates (gates.py, latency.py), what follows from them (rules.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from msgspec.structs import replace

from cloud_hub.rollouts import gates
from cloud_hub.rollouts.answers import NOTHING_SEEN, Answers, Evidence, Expected
from cloud_hub.rollouts.gates import Harm
from cloud_hub.rollouts.latency import Pair, pair_of, read_latency
from cloud_hub.rollouts.past import Likeness, expect, likeness
from cloud_hub.rollouts.values import Looked, Member, Rollout
from shared.ids import DeviceId
from shared.rollout import Condition, LatencyGate, Reading, Verdict, harmed_limit
from shared.sketch import merge_all

CONTROLS: Final = 50
"""So many devices that still run the release before say enough of the load."""


def controls_of(members: Iterable[Member]) -> tuple[Member, ...]:
    """Members that were not offered the release, of which figures since the start are wanted."""
    return tuple(member for member in members if member.condition is Condition.WAITING)[:CONTROLS]


def evidence_of(state: Rollout, event: Looked) -> Evidence:
    """The figures that gates read: of the release, and of what each device ran before or, as a control, still runs."""
    target = state.spec.version
    before: dict[DeviceId, str | None] = {}
    for member in state.members:
        if member.is_touched:
            before[member.device] = member.before
        elif sighting := event.sightings.get(member.device):
            before[member.device] = sighting.version
    touched = {member.device for member in state.members if member.is_touched}
    of_before = [seen for seen in event.new if seen.version != target and before.get(seen.device) == seen.version]
    return Evidence(
        new={seen.device: seen.answers for seen in event.new if seen.version == target and seen.device in touched},
        old={
            seen.device: seen.answers
            for seen in event.old
            if seen.version != target and before.get(seen.device) == seen.version
        },
        during={seen.device: seen.answers for seen in of_before if seen.device not in touched},
        expected=expected_of(state.members),
        profiles={member.device: member.profile for member in state.members},
    )


def expected_of(members: Iterable[Member]) -> dict[DeviceId, Expected]:
    """What is expected of each member of which that is known."""
    return {member.device: expected for member in members if (expected := member.expected) is not None}


def with_expectations(members: tuple[Member, ...], evidence: Evidence, *, least: int) -> tuple[Member, ...]:
    """The members, with what is expected of each that was offered the release, as soon as enough is known.

    Args:
        least: answers with a known outcome that its profile must have before; with fewer the whole fleet is taken.
    """
    lacking = [member for member in members if member.is_touched and member.expected is None]
    if not lacking:
        return members
    everyone = list(evidence.old.values())
    if sum(past.told for past in everyone) < least:
        return members
    likes: dict[str, Likeness] = {}
    for profile in {member.profile for member in lacking}:
        same = [past for device, past in evidence.old.items() if evidence.profiles.get(device) == profile]
        likes[profile] = likeness(same if sum(past.told for past in same) >= least else everyone)
    return tuple(
        _expecting(member, evidence.old, likes[member.profile])
        if member.is_touched and member.expected is None
        else member
        for member in members
    )


def _expecting(member: Member, old: Mapping[DeviceId, Answers], like: Likeness) -> Member:
    expected = expect(old.get(member.device, NOTHING_SEEN), like)
    return replace(member, expected_wrong=round(expected.share, 9), expected_weight=round(expected.weight, 3))


def read_gates(state: Rollout, event: Looked, evidence: Evidence) -> tuple[Reading, ...]:
    """What every gate says of the members as they are judged in this state."""
    spec = state.spec
    touched = [member for member in state.members if member.is_touched]
    readings = [gates.read_devices(spec.gates.devices, harm_of(state))]
    ran = any(member.before for member in touched) or any(
        sighting.version not in ("", spec.version) for sighting in event.sightings.values()
    )
    if spec.gates.outcomes.enabled:
        readings += _outcomes(state, evidence, touched) if ran else [_incomparable("outcomes", touched)]
    if spec.gates.latency.enabled:
        readings.append(_latency(spec.gates.latency, evidence, touched) if ran else _incomparable("latency", touched))
    return tuple(readings)


def harm_of(state: Rollout) -> Harm:
    """How the devices fared, all of them, and in the order of offers as far as that is known without a gap."""
    touched = [member for member in state.members if member.is_touched]
    harmed = [member for member in touched if member.condition is Condition.HARMED]
    ordered: list[Condition] = []
    for member in sorted(touched, key=lambda one: (one.offered_ms, one.position)):
        if member.condition is Condition.OFFERED:
            break
        ordered.append(member.condition)
    return Harm(
        healthy=sum(member.condition is Condition.HEALTHY for member in touched),
        harmed=len(harmed),
        fresh=sum(not member.acknowledged for member in harmed),
        limit=harmed_limit(state.spec, len(state.members)),
        healthy_in_order=ordered.count(Condition.HEALTHY),
        harmed_in_order=ordered.count(Condition.HARMED),
    )


def _outcomes(state: Rollout, evidence: Evidence, touched: list[Member]) -> list[Reading]:
    """One reading for all devices, and one for each profile where there are several.

    Alpha is shared out over all profiles of the rollout from its start, whether they were offered the release or not.
    """
    gate = state.spec.gates.outcomes
    profiles = sorted({member.profile for member in state.members})
    groups = profiles if len(profiles) > 1 else []
    share = 1 / (1 + len(groups))
    everyone = [member.device for member in touched]
    readings = [gates.read_outcomes(gate, evidence, touched=everyone, share=share)]
    for profile in groups:
        devices = [member.device for member in touched if member.profile == profile]
        if devices:
            name = f"outcomes:{profile}"
            readings.append(gates.read_outcomes(gate, evidence, touched=devices, share=share, name=name))
    return readings


def _latency(gate: LatencyGate, evidence: Evidence, touched: list[Member]) -> Reading:
    pairs: list[Pair] = []
    rest: dict[str, list[DeviceId]] = {}
    for member in touched:
        new = evidence.new.get(member.device, NOTHING_SEEN).latency
        pair = pair_of(new, evidence.old.get(member.device, NOTHING_SEEN).latency)
        if pair.is_enough(gate):
            pairs.append(pair)
        elif new.count:
            rest.setdefault(member.profile, []).append(member.device)
    for profile, devices in sorted(rest.items()):
        same = [past.latency for device, past in evidence.old.items() if evidence.profiles.get(device) == profile]
        pairs.append(pair_of(merge_all(evidence.new[device].latency for device in devices), merge_all(same)))
    controls = [
        pair_of(during.latency, evidence.old[device].latency.without(during.latency))
        for device, during in evidence.during.items()
        if device in evidence.old
    ]
    return read_latency(gate, pairs, controls=controls)


def _incomparable(gate: str, touched: list[Member]) -> Reading:
    if not touched:
        return Reading(gate=gate, verdict=Verdict.WAIT, why="no device was offered the release yet")
    why = "no device ran anything of this family before: there is nothing to compare with"
    return Reading(gate=gate, verdict=Verdict.PASS, why=why)
