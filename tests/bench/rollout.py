"""What the gates of a rollout do to good and to bad releases: the real rules over simulated fleets, seeds fixed.

The fleets are made to be difficult. Devices are of three profiles whose answers are wrong in 0.5, 1 and 3 % on average
and take 2, 4 and 12 ms, and each device has a share and a pace of its own around these (a beta distribution with the
weight 50, a factor of 1.35 either way). Half of the devices need more than a look to install a release, so a failure
shows sooner than health. Devices leave and return all the time: at a look 1 % of those present go, half of those gone
are back, so some stay away past the deadline.

A release with the fault rate r fails on a device with probability r when it is installed, and raises the device's share
of wrong answers by r - 1 %. Good releases have an r drawn between 0.5 and 2 %, bad ones 10 %. Fleets of 1000 and of 50
devices, default stages, gates and limits, a deadline of an hour, 20 answers with a known outcome per device and look, a
look every 15 minutes. A rollout that pauses for unresolved devices is resumed.

`false_abort_rate`: share of good releases that were rolled back; `bad_detected_rate`: share of bad ones that were;
`devices_failed_median`: devices on which a bad release failed before it was stopped, both fleets together. Their
twins with `_1000` and `_50` are the fleets apart; `..._devices_only` is with outcomes and latency off, so that nothing
but failed and silent devices is read. `paused_rate`: share of good rollouts that needed somebody to resume them.
`decide_us`: one decision over the whole fleet of 1000, median; `decide_us_50` over the small one.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloud_hub.rollouts import planning, rules
from cloud_hub.rollouts.answers import Answers
from cloud_hub.rollouts.evidence import controls_of
from cloud_hub.rollouts.values import Looked, ResumeAsked, Rollout, Seen, Sighting, Started, WishesDone
from shared.ids import DeviceId
from shared.rollout import ENDED, Phase, Wish, parse_spec
from shared.sketch import Sketch, sketch_of

OLD, NEW = "1.0.0", "1.1.0"
MANIFEST = {OLD: "0" * 64, NEW: "1" * 64}
LOOK_MS = 900_000
DEADLINE_S = 3600
PER_LOOK = 20
PROFILES = ("pi5", "pi4", "zero")
SHARES = (0.3, 0.6, 0.1)
WRONG = (0.005, 0.01, 0.03)
PACE_MS = (2.0, 4.0, 12.0)
ALIKE = 50
"""Weight of the distribution of shares within a profile."""
PACES = 200
"""So many devices of a profile have times of their own; the others have those of one of them."""
PAST = 60
"""Answers of each device before the rollout."""
LEAVES, RETURNS = 0.01, 0.5
AT_ONCE = 0.5
"""Share of devices that have installed a release by the next look; of the others half by the one after, and so on."""
BAD = 0.10
GOOD = (0.005, 0.02)
BEFORE = 0.01
TRIALS = {1000: (40, 20), 50: (400, 200)}
"""Good and bad releases in each fleet."""

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class End:
    """How one rollout ended."""

    phase: Phase
    failed: int
    resumed: int
    decide_us: list[float]


@dataclass(frozen=True)
class Paces:
    """Times that devices of each profile take: before the rollout, and with a release that is as fast."""

    old: list[list[Sketch]]
    new: list[list[Sketch]]


def run() -> dict[str, float]:
    """Simulate; takes about two minutes."""
    figures: dict[str, float] = {}
    paces = draw_paces(np.random.default_rng(20260))
    off = {"outcomes": {"enabled": False}, "latency": {"enabled": False}}
    for suffix, gates in (("", {}), ("_devices_only", off)):
        good: dict[int, list[End]] = {}
        bad: dict[int, list[End]] = {}
        for size, (goods, bads) in TRIALS.items():
            draw = np.random.default_rng([20260, size])
            good[size] = [one(size, float(draw.uniform(*GOOD)), [1, size, n], gates, paces) for n in range(goods)]
            bad[size] = [one(size, BAD, [2, size, n], gates, paces) for n in range(bads)]
            print(f"rollout: fleet of {size}{suffix}: {goods} good and {bads} bad releases", file=sys.stderr)
        if not suffix:
            figures["decide_us"] = statistics.median(took for end in good[1000] for took in end.decide_us)
            figures["decide_us_50"] = statistics.median(took for end in good[50] for took in end.decide_us)
        for size in TRIALS:
            figures |= summary(good[size], bad[size], f"{suffix}_{size}")
        # Each fleet counts the same, however many trials it had.
        for key in ("false_abort_rate", "bad_detected_rate"):
            figures[key + suffix] = statistics.mean(figures[f"{key}{suffix}_{size}"] for size in TRIALS)
        fewest = min(bads for _, bads in TRIALS.values())
        figures["devices_failed_median" + suffix] = statistics.median(
            end.failed for size in TRIALS for end in bad[size][:fewest]
        )
    return figures


def summary(good: list[End], bad: list[End], suffix: str) -> dict[str, float]:
    """The figures of one fleet."""
    return {
        f"false_abort_rate{suffix}": statistics.mean(end.phase is not Phase.COMPLETED for end in good),
        f"bad_detected_rate{suffix}": statistics.mean(end.phase is Phase.ROLLED_BACK for end in bad),
        f"devices_failed_median{suffix}": statistics.median(end.failed for end in bad),
        f"paused_rate{suffix}": statistics.mean(end.resumed > 0 for end in good),
    }


def draw_paces(random: np.random.Generator) -> Paces:
    """Sketches of as many answers as a device gives in a few looks."""
    old: list[list[Sketch]] = []
    new: list[list[Sketch]] = []
    for pace_ms in PACE_MS:
        own = pace_ms * 1000 * random.lognormal(0, 0.3, PACES)
        old.append([sketch_of(each * random.lognormal(0, 0.3, PAST)) for each in own])
        new.append([sketch_of(each * random.lognormal(0, 0.3, PAST)) for each in own])
    return Paces(old=old, new=new)


def one(size: int, fault: float, seed: list[int], gates: dict[str, Any], paces: Paces) -> End:
    """One rollout from its start to its end."""
    world = Fleet(size, fault, np.random.default_rng(seed), gates, paces)
    for _ in range(2000):
        world.look()
        if world.state.phase in ENDED:
            return End(world.state.phase, world.failed, world.resumed, world.decide_us)
    raise RuntimeError(f"a rollout did not end: {world.state.phase}, {world.state.reason}, {world.state.readings}")


class Fleet:
    """Devices that install, fail, answer, leave and return at given rates."""

    def __init__(
        self, size: int, fault: float, random: np.random.Generator, gates: dict[str, Any], paces: Paces
    ) -> None:
        self.names = [DeviceId(f"dev-{number}") for number in range(size)]
        self.index = {name: number for number, name in enumerate(self.names)}
        self.fault, self.random, self.paces, self.at_ms = fault, random, paces, 1_800_000_000_000
        self.kind: Numbers = random.choice(len(PROFILES), size, p=SHARES)
        mean = np.array(WRONG)[self.kind]
        share = random.beta(mean * ALIKE, (1 - mean) * ALIKE)
        self.share = {OLD: share, NEW: np.clip(share + fault - BEFORE, 0.0, 1.0)}
        self.wrong = {OLD: random.binomial(PAST, share), NEW: np.zeros(size, int)}
        self.told = {OLD: np.full(size, PAST), NEW: np.zeros(size, int)}
        self.here = np.ones(size, bool)
        self.seen_ms = np.full(size, self.at_ms)
        self.version = [OLD] * size
        self.error = [""] * size
        self.assigned = [0] * size
        self.installs: dict[int, str] = {}
        self.failed = self.resumed = 0
        self.decide_us: list[float] = []
        fields = {"deadline_s": DEADLINE_S, "gates": gates}
        spec = parse_spec({"family": "digits", "version": NEW, **fields})
        chosen = planning.choose(self._sightings(), spec, manifest=MANIFEST[NEW], taken={})
        self.state = Rollout(id="r", spec=spec, manifest=MANIFEST[NEW], created_ms=self.at_ms, created_by="bench")
        members = planning.members(chosen, spec)
        self.state = rules.decide(self.state, Started(at_ms=self.at_ms, actor="bench", members=members)).state

    def look(self) -> None:
        """Time passes, devices leave and return, install and answer; the controller looks, assignments are made."""
        self.at_ms += LOOK_MS
        draw = self.random.random(len(self.names))
        self.here = np.where(self.here, draw >= LEAVES, draw < RETURNS)
        self.seen_ms = np.where(self.here, self.at_ms, self.seen_ms)
        self._install()
        runs_new = np.array([version == NEW for version in self.version])
        for version, runs in ((OLD, ~runs_new & self.here), (NEW, runs_new & self.here)):
            wrong = self.random.binomial(PER_LOOK, self.share[version])
            self.wrong[version] = self.wrong[version] + np.where(runs, wrong, 0)
            self.told[version] = self.told[version] + np.where(runs, PER_LOOK, 0)
        event = Looked(
            at_ms=self.at_ms, watching_since_ms=0, sightings=self._sightings(), new=self._new(), old=self._old()
        )
        begun = time.perf_counter()
        decision = rules.decide(self.state, event)
        self.decide_us.append((time.perf_counter() - begun) * 1e6)
        self.state = decision.state
        if self.state.phase is Phase.PAUSED:
            self.resumed += 1
            self.state = rules.decide(self.state, ResumeAsked(at_ms=self.at_ms, actor="bench")).state
        self._assign()

    def _install(self) -> None:
        for number, version in list(self.installs.items()):
            if self.here[number] and self.random.random() < AT_ONCE:
                self.version[number] = version
                del self.installs[number]

    def _assign(self) -> None:
        while waiting := rules.outstanding(self.state):
            wish, assigned = waiting[0].wish, {}
            for member in (each for each in waiting if each.wish is wish):
                number = self.index[member.device]
                self.assigned[number] += 1
                assigned[member.device] = self.assigned[number]
                self.error[number] = ""
                if wish is Wish.TARGET and self.random.random() < self.fault:
                    self.failed += 1
                    self.error[number] = "model.golden"
                else:
                    self.installs[number] = OLD if wish is Wish.BEFORE else NEW
            event = WishesDone(at_ms=self.at_ms, wish=wish, assigned=assigned)
            self.state = rules.decide(self.state, event).state

    def _old(self) -> list[Seen]:
        return [self._seen(number, OLD) for number in range(len(self.names))]

    def _new(self) -> list[Seen]:
        release = [self._seen(int(number), NEW) for number in np.flatnonzero(self.told[NEW])]
        return release + [self._during(self.index[member.device]) for member in controls_of(self.state.members)]

    def _seen(self, number: int, version: str) -> Seen:
        told, wrong = int(self.told[version][number]), int(self.wrong[version][number])
        pace = (self.paces.old if version == OLD else self.paces.new)[self.kind[number]][number % PACES]
        return Seen(self.names[number], version, Answers(told, told - wrong, wrong, pace))

    def _during(self, number: int) -> Seen:
        told = int(self.told[OLD][number]) - PAST
        return Seen(self.names[number], OLD, Answers(told, told, 0, Sketch()))

    def _sightings(self) -> dict[DeviceId, Sighting]:
        return {
            name: Sighting(
                device=name,
                profile=PROFILES[self.kind[number]],
                online=bool(self.here[number]),
                last_seen_ms=int(self.seen_ms[number]),
                assignment_version=self.assigned[number],
                phase="committed",
                version=self.version[number],
                manifest=MANIFEST[self.version[number]],
                error_code=self.error[number],
            )
            for number, name in enumerate(self.names)
        }


if __name__ == "__main__":
    for key, value in run().items():
        print(f"{key:44} {value:.4g}")
