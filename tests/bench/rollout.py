"""What the gates of a rollout do to good and to bad releases: the real rules over simulated fleets, seeds fixed.

A release with the fault rate r fails on a device with probability r when it is installed, independently, and answers
wrongly with probability r where it runs; the release before is wrong in 1 % of its answers. Good releases have an r
drawn between 0.5 and 2 %, bad ones 10 %. Fleets of 1000 and of 50 devices, default stages, gates and limits, 20
answers with a known outcome per device and look, a look every 15 minutes.

`false_abort_rate`: share of good releases that were rolled back; `bad_detected_rate`: share of bad ones that were;
`devices_failed_median`: devices on which a bad release failed before it was stopped, both fleets together. Their
twins with `_1000` and `_50` are the fleets apart; `..._devices_only` is with the outcome gate off, so that nothing but
failed installations is read. `decide_us`: one decision over the whole fleet of 1000, median; `decide_us_50` over the
small one.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from cloud_hub.rollouts import planning, rules
from cloud_hub.rollouts.gates import Answers
from cloud_hub.rollouts.values import Looked, Rollout, Seen, Sighting, Started, WishesDone
from shared.ids import DeviceId
from shared.rollout import ENDED, Phase, Wish, parse_spec
from shared.sketch import Sketch, sketch_of

OLD, NEW = "1.0.0", "1.1.0"
MANIFEST = {OLD: "0" * 64, NEW: "1" * 64}
LOOK_MS = 900_000
PER_LOOK = 20
BEFORE_WRONG = 0.01
PAST = 60
"""Answers of each device before the rollout."""
BAD = 0.10
TRIALS = {1000: 150, 50: 600}


@dataclass(frozen=True)
class End:
    """How one rollout ended."""

    phase: Phase
    failed: int
    decide_us: list[float]


def run() -> dict[str, float]:
    """Simulate; takes about a minute."""
    figures: dict[str, float] = {}
    for suffix, gates in (("", {}), ("_devices_only", {"outcomes": {"enabled": False}})):
        good: dict[int, list[End]] = {}
        bad: dict[int, list[End]] = {}
        for size, trials in TRIALS.items():
            draw = np.random.default_rng([20260, size])
            good[size] = [one(size, float(draw.uniform(0.005, 0.02)), [1, size, n], gates) for n in range(trials)]
            bad[size] = [one(size, BAD, [2, size, n], gates) for n in range(trials)]
            print(f"rollout: fleet of {size}{suffix}: {trials} good and {trials} bad releases", file=sys.stderr)
        if not suffix:
            figures["decide_us"] = statistics.median(took for end in good[1000] for took in end.decide_us)
            figures["decide_us_50"] = statistics.median(took for end in good[50] for took in end.decide_us)
        for size in TRIALS:
            figures |= summary(good[size], bad[size], f"{suffix}_{size}")
        # Each fleet counts the same, however many trials it had.
        for key in ("false_abort_rate", "bad_detected_rate"):
            figures[key + suffix] = statistics.mean(figures[f"{key}{suffix}_{size}"] for size in TRIALS)
        figures["devices_failed_median" + suffix] = statistics.median(
            end.failed for size in TRIALS for end in bad[size][: min(TRIALS.values())]
        )
    return figures


def summary(good: list[End], bad: list[End], suffix: str) -> dict[str, float]:
    """The figures of one fleet."""
    return {
        f"false_abort_rate{suffix}": statistics.mean(end.phase is not Phase.COMPLETED for end in good),
        f"bad_detected_rate{suffix}": statistics.mean(end.phase is Phase.ROLLED_BACK for end in bad),
        f"devices_failed_median{suffix}": statistics.median(end.failed for end in bad),
    }


def one(size: int, fault: float, seed: list[int], gates: dict[str, Any]) -> End:
    """One rollout from its start to its end."""
    world = Fleet(size, fault, np.random.default_rng(seed), gates)
    for _ in range(2000):
        world.look()
        if world.state.phase in ENDED:
            return End(world.state.phase, world.failed, world.decide_us)
    raise RuntimeError(f"a rollout did not end: {world.state.phase}, {world.state.reason}")


class Fleet:
    """Devices that install, fail and answer at given rates."""

    def __init__(self, size: int, fault: float, random: np.random.Generator, gates: dict[str, Any]) -> None:
        self.names = [DeviceId(f"dev-{number}") for number in range(size)]
        self.index = {name: number for number, name in enumerate(self.names)}
        self.fault, self.random, self.at_ms = fault, random, 1_800_000_000_000
        self.sightings = {name: self._sighting(name, OLD, 0, "") for name in self.names}
        self.wrong = {OLD: random.binomial(PAST, BEFORE_WRONG, size), NEW: np.zeros(size, int)}
        self.told = {OLD: np.full(size, PAST), NEW: np.zeros(size, int)}
        self.latency: Sketch = sketch_of(random.lognormal(7.6, 0.2, 50))
        self.failed = 0
        self.decide_us: list[float] = []
        spec = parse_spec({"family": "digits", "version": NEW, "gates": gates})
        chosen = planning.choose(self.sightings, spec, manifest=MANIFEST[NEW], taken={})
        self.state = Rollout(id="r", spec=spec, manifest=MANIFEST[NEW], created_ms=self.at_ms, created_by="bench")
        members = planning.members(chosen, spec)
        self.state = rules.decide(self.state, Started(at_ms=self.at_ms, actor="bench", members=members)).state

    def look(self) -> None:
        """Time passes, applications answer, the controller looks, devices act on what they are assigned."""
        self.at_ms += LOOK_MS
        runs_new = np.array([self.sightings[name].version == NEW for name in self.names])
        for version, runs, rate in ((OLD, ~runs_new, BEFORE_WRONG), (NEW, runs_new, self.fault)):
            self.wrong[version] = self.wrong[version] + np.where(
                runs, self.random.binomial(PER_LOOK, rate, len(runs)), 0
            )
            self.told[version] = self.told[version] + np.where(runs, PER_LOOK, 0)
        event = Looked(
            at_ms=self.at_ms,
            watching_since_ms=0,
            sightings=self.sightings,
            new=self._seen(NEW),
            old=self._seen(OLD),
        )
        begun = time.perf_counter()
        decision = rules.decide(self.state, event)
        self.decide_us.append((time.perf_counter() - begun) * 1e6)
        self.state = decision.state
        self._assign()

    def _assign(self) -> None:
        while waiting := rules.outstanding(self.state):
            wish, assigned = waiting[0].wish, {}
            for member in (each for each in waiting if each.wish is wish):
                number = self.sightings[member.device].assignment_version + 1
                assigned[member.device] = number
                fails = wish is Wish.TARGET and self.random.random() < self.fault
                self.failed += fails
                version = OLD if fails or wish is Wish.BEFORE else NEW
                error = "model.golden" if fails else ""
                self.sightings[member.device] = self._sighting(member.device, version, number, error)
            event = WishesDone(at_ms=self.at_ms, wish=wish, assigned=assigned)
            self.state = rules.decide(self.state, event).state

    def _seen(self, version: str) -> list[Seen]:
        told, wrong = self.told[version].tolist(), self.wrong[version].tolist()
        return [
            Seen(name, version, Answers(told[n], told[n] - wrong[n], wrong[n], self.latency))
            for n, name in enumerate(self.names)
            if told[n]
        ]

    def _sighting(self, name: DeviceId, version: str, assignment_version: int, error: str) -> Sighting:
        return Sighting(
            device=name,
            profile="pi4",
            online=True,
            assignment_version=assignment_version,
            phase="committed",
            version=version,
            manifest=MANIFEST[version],
            error_code=error,
        )


if __name__ == "__main__":
    for key, value in run().items():
        print(f"{key:44} {value:.4g}")
