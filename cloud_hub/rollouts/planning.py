"""Whom a rollout is for, in which order, and what it would cost: a look ahead that changes nothing.

Not here: the fleet and the release (desk.py gathers them), what a selection may say (shared/rollout.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from cloud_hub.rollouts import gates
from cloud_hub.rollouts.stages import COMMITTED
from cloud_hub.rollouts.values import Member, Seen, Sighting
from shared.ids import DeviceId
from shared.rollout import Plan, SkippedView, Spec, StagePlan, harmed_limit, stage_sizes

MAX_SHOWN: Final = 10_000
FEW: Final = 0.25
"""A first stage that misses this share of harmed devices is worth a warning."""


class Release(msgspec.Struct, frozen=True, kw_only=True):
    """The release that is rolled out: the digest of its manifest, and the bytes that a device fetches at most."""

    manifest: str
    bytes: int


class Chosen(msgspec.Struct, frozen=True, kw_only=True):
    """The devices that a rollout is for, and those that it leaves out."""

    eligible: Mapping[DeviceId, Sighting]
    skipped: tuple[SkippedView, ...]


def choose(fleet: Mapping[DeviceId, Sighting], spec: Spec, *, manifest: str, taken: Mapping[DeviceId, str]) -> Chosen:
    """Sort the fleet by the selection.

    Args:
        taken: devices that another rollout of the family has, with its id.
    """
    select = spec.select
    skipped = [SkippedView(device=name, reason="unknown device") for name in select.devices if name not in fleet]
    named, eligible = set(select.devices), {}
    for device, sighting in sorted(fleet.items()):
        if select.devices and device not in named:
            continue
        if not select.labels.items() <= sighting.labels.items():
            continue
        if sighting.standing:
            skipped.append(SkippedView(device=device, reason=sighting.standing))
        elif device in taken:
            skipped.append(SkippedView(device=device, reason=f"in rollout {taken[device]}"))
        elif sighting.manifest == manifest and sighting.phase == COMMITTED:
            skipped.append(SkippedView(device=device, reason="runs it already"))
        else:
            eligible[device] = sighting
    return Chosen(eligible=eligible, skipped=tuple(skipped))


def members(chosen: Chosen, spec: Spec) -> tuple[Member, ...]:
    """The members of a rollout in the order of offers."""
    profiles = {device: sighting.profile for device, sighting in chosen.eligible.items()}
    without = frozenset(device for device, sighting in chosen.eligible.items() if not sighting.version)
    ordered = order(profiles, seed=f"{spec.family}/{spec.version}", without=without)
    return tuple(
        Member(device=device, position=position, profile=profiles[device]) for position, device in enumerate(ordered)
    )


def order(
    profiles: Mapping[DeviceId, str], *, seed: str, without: frozenset[DeviceId] = frozenset()
) -> tuple[DeviceId, ...]:
    """Devices in the order of offers: the first of each profile, then all others, by a hash that nobody chose.

    Devices `without` anything of the family come last: with them there is nothing to compare, and no way back.
    """
    shuffled = sorted(profiles, key=lambda device: hashlib.sha256(f"{seed}\n{device}".encode()).digest())
    ordered: list[DeviceId] = []
    for group in ([d for d in shuffled if d not in without], [d for d in shuffled if d in without]):
        firsts: dict[str, DeviceId] = {}
        for device in group:
            firsts.setdefault(profiles[device], device)
        leading = set(firsts.values())
        ordered += [*firsts.values(), *(device for device in group if device not in leading)]
    return tuple(ordered)


def plan(chosen: Chosen, spec: Spec, *, release: Release, old: Sequence[Seen], warnings: Sequence[str] = ()) -> Plan:
    """What the rollout would do.

    Args:
        old: figures of what the devices run now.
        warnings: what the caller found, shown first.
    """
    ordered = members(chosen, spec)
    sizes = stage_sizes(spec, len(ordered))
    stages: list[StagePlan] = []
    for index, size in enumerate(sizes):
        profiles: dict[str, int] = {}
        for member in ordered[:size]:
            profiles[member.profile] = profiles.get(member.profile, 0) + 1
        added = size - (sizes[index - 1] if index else 0)
        stages.append(
            StagePlan(
                number=index + 1,
                devices=size,
                added=added,
                profiles=profiles,
                missed_rate=round(gates.missed_rate(size), 4),
                bytes=added * release.bytes,
            )
        )
    runs = {device: sighting.version for device, sighting in chosen.eligible.items()}
    past = [seen.answers for seen in old if runs.get(seen.device) == seen.version]
    told, wrong = sum(answers.told for answers in past), sum(answers.wrong for answers in past)
    find, clear = gates.answers_needed(spec.gates.outcomes, wrong=wrong, told=told)
    without = sum(not version for version in runs.values())
    unreachable = sum(not sighting.online for sighting in chosen.eligible.values())
    return Plan(
        family=spec.family,
        version=spec.version,
        manifest=release.manifest,
        eligible=tuple(member.device for member in ordered[:MAX_SHOWN]),
        skipped=chosen.skipped[:MAX_SHOWN],
        unreachable=unreachable,
        without_before=without,
        stages=tuple(stages),
        bytes_per_device=release.bytes,
        bytes=release.bytes * len(ordered),
        max_harmed=harmed_limit(spec, len(ordered)),
        before_told=told,
        before_wrong=wrong,
        answers_to_find=find,
        answers_to_clear=clear,
        least_s=spec.soak_s * len(sizes),
        warnings=(*warnings, *_warnings(spec, stages, without=without, unreachable=unreachable, told=told)),
    )


def _warnings(spec: Spec, stages: Sequence[StagePlan], *, without: int, unreachable: int, told: int) -> tuple[str, ...]:
    found: list[str] = []
    if not stages:
        return ("no device is eligible",)
    first = stages[0]
    if first.missed_rate > FEW:
        found.append(
            f"with {first.devices} devices in the first stage a share of harmed devices below {first.missed_rate:.0%} "
            "has more than 5 % chance to show none"
        )
    if without:
        found.append(f"{without} devices run nothing of {spec.family}: they cannot go back to anything")
    if unreachable:
        found.append(f"{unreachable} devices are not connected; they are offered the release when they come")
    outcomes = spec.gates.outcomes
    if outcomes.enabled and without < stages[-1].devices and told < outcomes.min_baseline:
        found.append(
            f"only {told} answers of the release before have a known outcome, {outcomes.min_baseline} are needed: the "
            "outcome gate will wait until applications have said more (feedback), or leave it out"
        )
    return tuple(found)
