"""What the gates of a rollout are given, and what they say: all readings of one look at the fleet.

The comparison is with what each device ran before it was offered the release; devices that still run it are the
control and count as well. Where no device ran anything of the family before, there is nothing to compare with.

Not here: the tests behind the gates (gates.py), what follows from them (rules.py).
"""

from __future__ import annotations

from cloud_hub.rollouts import gates
from cloud_hub.rollouts.gates import Evidence, Harm
from cloud_hub.rollouts.values import Looked, Member, Rollout
from shared.ids import DeviceId
from shared.rollout import Condition, Reading, Verdict, harmed_limit


def evidence_of(state: Rollout, event: Looked) -> Evidence:
    """The figures that gates read: of the release, and of what each device ran before or, as a control, still runs."""
    target = state.spec.version
    new = {seen.device: seen.answers for seen in event.new if seen.version == target}
    before: dict[DeviceId, str | None] = {}
    for member in state.members:
        if member.condition is not Condition.WAITING:
            before[member.device] = member.before
        elif sighting := event.sightings.get(member.device):
            before[member.device] = sighting.version
    old = {
        seen.device: seen.answers
        for seen in event.old
        if seen.version != target and before.get(seen.device) == seen.version
    }
    return Evidence(new=new, old=old)


def read_gates(state: Rollout, event: Looked) -> tuple[Reading, ...]:
    """What every gate says of the members as they are judged in this state."""
    spec, evidence = state.spec, evidence_of(state, event)
    touched = [member for member in state.members if member.is_touched]
    harmed = [member for member in touched if member.condition is Condition.HARMED]
    harm = Harm(
        healthy=sum(member.condition is Condition.HEALTHY for member in touched),
        harmed=len(harmed),
        fresh=sum(not member.acknowledged for member in harmed),
        limit=harmed_limit(spec, len(state.members)),
    )
    readings = [gates.read_devices(spec.gates.devices, harm)]
    comparable = any(member.before for member in touched)
    names = [member.device for member in touched]
    if spec.gates.outcomes.enabled:
        readings += _outcomes(state, evidence, touched) if comparable else [_incomparable("outcomes")]
    if spec.gates.latency.enabled:
        read = gates.read_latency(spec.gates.latency, evidence, touched=names)
        readings.append(read if comparable else _incomparable("latency"))
    return tuple(readings)


def _outcomes(state: Rollout, evidence: Evidence, touched: list[Member]) -> list[Reading]:
    """One reading for all devices, and one for each profile where there are several; alpha is shared out."""
    gate = state.spec.gates.outcomes
    by_profile: dict[str, list[DeviceId]] = {}
    for member in touched:
        by_profile.setdefault(member.profile, []).append(member.device)
    groups = {f"outcomes:{profile}": devices for profile, devices in sorted(by_profile.items())}
    if len(groups) < 2:
        groups = {}
    share = 1 / (1 + len(groups))
    everyone = [member.device for member in touched]
    readings = [gates.read_outcomes(gate, evidence, touched=everyone, share=share)]
    for name, devices in groups.items():
        readings.append(gates.read_outcomes(gate, evidence, touched=devices, share=share, name=name))
    return readings


def _incomparable(gate: str) -> Reading:
    why = "no device ran anything of this family before: there is nothing to compare with"
    return Reading(gate=gate, verdict=Verdict.PASS, why=why)
