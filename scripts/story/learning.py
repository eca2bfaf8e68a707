"""The step `federated-run`: devices learn from digits that never leave them, and what they learn together is a release.

Each device is taught mostly some of the digits. Alone, it would learn those and little else; that is computed here,
with the devices' own trainer. Together they learn all of them, by stock Flower FedAvg in the hub.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np

from cloud_hub.cli.hub import Document
from edge_agent.trainers.head import Descent, Head, learn, measure
from shared.errors import OutriderError

from .beginning import sign, wait_committed
from .cast import FAMILY, Device, House
from .digits import FEATURES, INPUT, LABELS, Part, split
from .staged import GOOD
from .telling import Figure, NeverTrue, NotTrue, Teller, expect, require, until
from .work import DEADLINE_MS, ask_all

LEARNED: Final = "1.6.0"
MOSTLY: Final = ((0, 1, 2, 3), (4, 5, 6), (7, 8, 9))
"""The digits that each device is mostly taught."""
OWN: Final = 40
OTHER: Final = 1
"""Samples of each of these digits, and of each of the others."""
ROUNDS: Final = 20
RATE: Final = 0.05
BATCH: Final = 16
KILL_AFTER: Final = 7
"""The hub is killed when so many rounds are done."""

RUN_S: Final = 90.0
LEAST_AHEAD: Final = 0.20
LEAST_ACCURACY: Final = 0.93
TITLES: Final = ("device", "taught", "mostly", "right alone")


@dataclass(frozen=True, slots=True)
class Held:
    """A run that was held: its rounds, the last one before the kill, and its result's accuracy on golden samples."""

    rounds: int
    killed_after: int
    seconds: float
    accuracy: float


def federated_run(house: House, tell: Teller) -> Mapping[str, Figure]:
    """Teach, compute what each device reaches alone, hold 20 rounds with the hub killed on the way, release."""
    lessons = dict(zip(house.names, _lessons(), strict=True))
    for device in house.devices:
        _teach(device, lessons[device.name])
    alone = _alone(house, lessons)
    mean_alone = sum(alone.values()) / len(alone)
    rows = [
        (name, len(part.labels), " ".join(str(digit) for digit in digits), f"{alone[name]:.1%}")
        for (name, part), digits in zip(lessons.items(), MOSTLY, strict=True)
    ]
    tell.table(TITLES, rows)
    tell.say(
        f"Each device was taught digits of its own, mostly some of the ten; they stay on its disk. Alone, with "
        f"{ROUNDS} passes over its own, a device would read {mean_alone:.1%} of the held-back digits on average."
    )
    held = _run(house)
    sign(house, LEARNED)
    house.operator.run("release", "publish", f"{FAMILY}/{LEARNED}", "--assign", "all")
    wait_committed(house, LEARNED)
    tallies = ask_all(house, range(len(house.held_back.labels)), title="learned")
    for name, tally in tallies.items():
        expect(f"versions that answered on {name}", wanted={LEARNED}, found=tally.versions)
    together = min(tally.accuracy for tally in tallies.values())
    ahead = together - mean_alone
    require(ahead >= LEAST_AHEAD, f"together they are right {LEAST_AHEAD:.0%} more often: {together:.1%}")
    require(together >= LEAST_ACCURACY, f"what they learned is right often enough: {together:.1%}")
    tell.say(
        f"Then they learned together: {ROUNDS} rounds of Flower's FedAvg from an empty last layer, in "
        f"{held.seconds:.1f} s, although the hub was killed with kill -9 after round {held.killed_after}. Only weights "
        f"travelled. The hub measured {held.accuracy:.1%} on its golden samples and built the result as {LEARNED}; it "
        f"was signed and went out like any other release. The devices now read {together:.1%}: {100 * ahead:.0f} "
        "points more than alone."
    )
    return {
        "rounds": held.rounds,
        "killed_after_round": held.killed_after,
        "seconds_with_the_kill": round(held.seconds, 2),
        "alone_mean": round(mean_alone, 4),
        **{f"alone_{name}": round(accuracy, 4) for name, accuracy in alone.items()},
        "together": round(together, 4),
        "points_ahead": round(100 * ahead, 1),
        "golden_accuracy": round(held.accuracy, 4),
    }


def _lessons() -> list[Part]:
    """Skewed digits for each device, of the training part; no image goes to two devices."""
    part = split().train
    by_digit = {digit: np.flatnonzero(part.labels == digit) for digit in range(len(LABELS))}
    lessons = []
    for number, mostly in enumerate(MOSTLY):
        rows = []
        for digit, all_of_it in by_digit.items():
            begin = 0 if digit in mostly else OWN + number * OTHER
            rows.append(all_of_it[begin : begin + (OWN if digit in mostly else OTHER)])
        chosen = np.random.default_rng(number).permutation(np.concatenate(rows))
        lessons.append(Part(part.pixels[chosen], part.labels[chosen]))
    return lessons


def _teach(device: Device, part: Part) -> None:
    try:
        with device.client() as client:
            for pixels, label in zip(part.pixels, part.labels, strict=True):
                client.teach(FAMILY, {INPUT: pixels[None]}, LABELS[int(label)])
    except OutriderError as error:
        raise NotTrue(f"{device.name} could not be taught: {error.message} ({error.code})") from error


def _alone(house: House, lessons: Mapping[str, Part]) -> dict[str, float]:
    """What each device would reach by itself: the same trainer, as many passes, the features that it computes."""
    reached = {}
    for device in house.devices:
        part = lessons[device.name]
        features, held_back = (_features(device, pixels) for pixels in (part.pixels, house.held_back.pixels))
        head = Head(np.zeros((features.shape[1], len(LABELS)), np.float32), np.zeros(len(LABELS), np.float32))
        for number in range(ROUNDS):
            descent = Descent(learning_rate=RATE, epochs=1, batch_size=BATCH, seed=number)
            head = learn(head, features, part.labels, descent)
        reached[device.name] = measure(head, held_back, house.held_back.labels)["accuracy"]
    return reached


def _features(device: Device, pixels: Any) -> Any:
    try:
        with device.client() as client:
            return np.array(client.infer(FAMILY, {INPUT: pixels}, deadline_ms=DEADLINE_MS).outputs[FEATURES])
    except OutriderError as error:
        raise NotTrue(f"{device.name} gives no features: {error.message} ({error.code})") from error


def _run(house: House) -> Held:
    """Hold the run to its end, with the hub killed on the way."""
    began = time.monotonic()
    started = house.operator.run(
        "round", "start",
        "--family", FAMILY, "--base", GOOD, "--as", LEARNED,
        "--rounds", str(ROUNDS),
        "--strategy", "fedavg",
        "--min-devices", str(len(house.devices)),
        "--learning-rate", str(RATE),
        "--batch-size", str(BATCH),
    )  # fmt: skip
    run = str(started["run"])
    killed_after = until(f"round {KILL_AFTER} is done", partial(_has_done, house, run), seconds=RUN_S)
    house.lose_hub()
    ended = until("the run has finished", partial(_finished, house, run), seconds=RUN_S)
    expect("rounds that were held", wanted=list(range(1, ROUNDS + 1)), found=_numbers(ended["rounds"]))
    return Held(
        rounds=len(ended["rounds"]),
        killed_after=killed_after,
        seconds=time.monotonic() - began,
        accuracy=float(ended["accuracy"]),
    )


def _numbers(rounds: Sequence[Mapping[str, Any]]) -> list[int]:
    return [int(each["round"]) for each in rounds]


def _status(house: House, run: str) -> dict[str, Any]:
    status = house.operator.hub().get(f"/v1/rounds/{run}", Document)
    if status["state"] in ("failed", "stopped"):
        raise NeverTrue(f"the run goes on: it has {status['state']}: {status['reason']} ({status['code']})")
    return status


def _has_done(house: House, run: str) -> int | None:
    number = int(_status(house, run)["round"])
    return number if number >= KILL_AFTER else None


def _finished(house: House, run: str) -> dict[str, Any] | None:
    status = _status(house, run)
    return status if status["state"] == "finished" else None
