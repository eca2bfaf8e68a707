"""The steps `hard-digits` and `cloud-stalls`: devices ask the hub's larger model when in doubt, and never wait for it.

The hard digits are the held-back ones, seen through noise. A device that is not sure of its own answer sends the
question to the hub, if there is time; the application gets the better of both answers, always by its deadline.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Final

from shared.errors import OutriderError

from . import books
from .beginning import push, sign
from .cast import FAMILY, Device, House
from .digits import INPUT, LABELS, Part, noisy
from .killing import hub_asleep
from .telling import Figure, NotTrue, Teller, expect, require, until
from .work import side_by_side

LARGE: Final = "digits-large"
NOISE: Final = 5.0
NOISE_SEED: Final = 11
BELOW: Final = 0.65
ROWS: Final = 200
CASCADE: Final = f"""
[cascade]
model = "{LARGE}"
family = "{FAMILY}"
below = {BELOW}
per_minute = 6000
"""
DEADLINE_MS: Final = 300
ALLOWANCE_MS: Final = 100
"""What the way through the socket, and an application that shares its interpreter with others, may add to that."""
READY_S: Final = 20.0
LEAST_GAIN: Final = 0.05
STALLED_ROWS: Final = 60
JOINED_S: Final = 15.0
AGAIN_S: Final = 30.0
IN_VAIN: Final[Mapping[str, str]] = MappingProxyType(
    {"late": "had asked it in vain", "breaker": "did not ask it again so soon"}
)
TITLES: Final = ("device", "asked", "alone", "with the hub", "answered by the hub", "99 % within")


@dataclass(slots=True)
class Doubts:
    """What one device's application saw of hard digits.

    Attributes:
        rungs: answers by the step of the ladder that they came from.
        escalated: answers by what became of the question to the hub; empty where none was wanted.
        took_ms: per answer, on the application's clock.
        late: requests that the hub did not answer in time.
        unmarked: answers that wanted the hub's word, had to do without it, and do not say so.
        overdue: answers that came after their deadline and the allowance, by the application's clock, or say so.
    """

    asked: int = 0
    right: int = 0
    rungs: Counter[str] = field(default_factory=Counter)
    escalated: Counter[str] = field(default_factory=Counter)
    took_ms: list[float] = field(default_factory=list)
    late: list[str] = field(default_factory=list)
    unmarked: int = 0
    overdue: int = 0

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0 to 1."""
        return self.right / self.asked if self.asked else 0.0

    def within_ms(self, share: float) -> float:
        """So much of the answers came within this."""
        return sorted(self.took_ms)[min(len(self.took_ms) - 1, int(share * len(self.took_ms)))]


def hard_digits(house: House, tell: Teller) -> Mapping[str, Figure]:
    """The same noisy digits twice: with what the devices know themselves, then with the hub's larger model behind."""
    push(house, "1.0.0", LARGE, family=LARGE)
    sign(house, "1.0.0", family=LARGE)
    house.operator.run("release", "publish", f"{LARGE}/1.0.0")
    hard = noisy(house.held_back, noise=NOISE, seed=NOISE_SEED)
    rows = range(ROWS)
    alone = _ask_all(house, hard, rows, title="hard")
    for device in house.devices:
        device.reconfigure(CASCADE)
    for device in house.devices:
        device.wait_online()
        until(f"{device.name} serves again", partial(device.serves, house.served), seconds=READY_S)
        until(f"the hub answers {device.name}", partial(_is_answered, device, hard, "warm"), seconds=READY_S)
    helped = _ask_all(house, hard, rows, title="doubtful")
    table, shares = [], []
    for name, tally in helped.items():
        shares.append(tally.rungs["cloud"] / tally.asked)
        before, after = f"{alone[name].accuracy:.1%}", f"{tally.accuracy:.1%}"
        table.append((name, tally.asked, before, after, f"{shares[-1]:.0%}", f"{tally.within_ms(0.99):.0f} ms"))
    tell.table(TITLES, table)
    share = _mean(shares)
    accuracy_alone = _mean(tally.accuracy for tally in alone.values())
    accuracy_helped = _mean(tally.accuracy for tally in helped.values())
    overdue = sum(tally.overdue for tally in (*alone.values(), *helped.values()))
    expect("answers after their deadline", wanted=0, found=overdue)
    require(accuracy_helped >= accuracy_alone + LEAST_GAIN, f"the larger model helps: {helped}")
    tell.say(
        f"A larger model stays on the hub, signed and published like the others. Through heavy noise the devices alone "
        f"read {accuracy_alone:.1%} of the digits. Asking the hub where they were less than {BELOW:.0%} sure, about "
        f"{share:.0%} of the time, they read {accuracy_helped:.1%}; every answer was there in time: on the "
        f"application's clock, within its {DEADLINE_MS} ms and {ALLOWANCE_MS} ms for the way."
    )
    return {
        "asked": sum(tally.asked for tally in helped.values()),
        "accuracy_alone": round(accuracy_alone, 4),
        "accuracy_with_hub": round(accuracy_helped, 4),
        "share_answered_by_hub": round(share, 4),
        "p99_ms": round(max(tally.within_ms(0.99) for tally in helped.values()), 1),
        "after_deadline": overdue,
    }


def cloud_stalls(house: House, tell: Teller) -> Mapping[str, Figure]:
    """The hub takes questions and answers none; then it wakes up, and what it says late is not lost."""
    hard = noisy(house.held_back, noise=NOISE, seed=NOISE_SEED)
    with hub_asleep(house):
        stalled = _ask_all(house, hard, range(STALLED_ROWS), title="stalled", feedback=False)
    told = sum((tally.escalated for tally in stalled.values()), Counter[str]())
    expect("answers of the sleeping hub", wanted=0, found=told["answered"])
    require(told["late"], f"the hub was asked and stayed silent: {dict(told)}")
    expect(
        "answers without the mark that a better one was wanted",
        wanted=0,
        found=sum(tally.unmarked for tally in stalled.values()),
    )
    overdue = sum(tally.overdue for tally in stalled.values())
    expect("answers after their deadline", wanted=0, found=overdue)
    late = {device.name: stalled[device.name].late for device in house.devices}
    until("the hub still answers what it was asked", partial(_joined, house, late), seconds=JOINED_S)
    for device in house.devices:
        until(f"the hub answers {device.name} again", partial(_is_answered, device, hard, "awake"), seconds=AGAIN_S)
    books.wait_settled(house)
    counted = [books.compare(house, device) for device in house.devices]
    joined = _joined(house, late)
    until(f"the hub keeps {joined} late answers as labels", lambda: _labels(house) == joined, seconds=JOINED_S)
    asked = sum(tally.asked for tally in stalled.values())
    slowest_ms = max(max(tally.took_ms) for tally in stalled.values())
    tell.table(books.TITLES, [count.row() for count in counted])
    tell.say(
        f"The hub was stopped so that it took questions and answered none. All {asked} answers came within their "
        f"{DEADLINE_MS} ms and {ALLOWANCE_MS} ms for the way all the same (the slowest after {slowest_ms:.0f} ms); "
        f"{sum(told.values())} of them say that a better one was wanted: {_words(told)}. Awake again, the hub still "
        f"answered {joined} of the {told['late']} that had asked; they can be fetched and are kept as labels, and "
        "everything is as before."
    )
    return {
        "asked": asked,
        "in_time": asked - overdue,
        "slowest_ms": round(slowest_ms, 1),
        **{f"escalated_{what}": count for what, count in sorted(told.items())},
        "late_answers": joined,
        "late_labels": _labels(house),
        "missing": sum(count.missing for count in counted),
        "twice": sum(count.twice for count in counted),
    }


def _ask_all(house: House, hard: Part, rows: Sequence[int], *, title: str, feedback: bool = True) -> dict[str, Doubts]:
    """All devices at the same time."""
    return side_by_side(house.devices, lambda device: _ask(device, hard, rows, title=title, feedback=feedback))


def _ask(device: Device, hard: Part, rows: Sequence[int], *, title: str, feedback: bool) -> Doubts:
    seen = Doubts()
    try:
        with device.client() as client:
            for row in rows:
                request, truth = f"{title}-{row}", LABELS[int(hard.labels[row])]
                began = time.monotonic()
                answer = client.infer(FAMILY, {INPUT: hard.pixels[row : row + 1]}, id=request, deadline_ms=DEADLINE_MS)
                took_ms = 1000 * (time.monotonic() - began)
                seen.took_ms.append(took_ms)
                device.answered[request] = str(answer.label)
                seen.asked += 1
                seen.right += answer.label == truth
                seen.rungs[answer.rung] += 1
                seen.overdue += took_ms > DEADLINE_MS + ALLOWANCE_MS or not answer.deadline_met
                if answer.escalated:
                    seen.escalated[answer.escalated] += 1
                    helped = answer.escalated == "answered"
                    seen.unmarked += not helped and not (answer.degraded and answer.reason)
                if answer.escalated == "late":
                    seen.late.append(request)
                if feedback:
                    client.feedback(request, label=truth)
                    device.confirmed.add(request)
    except OutriderError as error:
        raise NotTrue(f"{device.name} refused to answer: {error.message} ({error.code})") from error
    return seen


def _is_answered(device: Device, hard: Part, title: str) -> bool:
    """Whether the hub answers the first digit that the device is not sure of."""
    tries = sum(1 for request in device.answered if request.startswith(f"{title}."))
    for row in range(len(hard.labels)):
        seen = _ask(device, hard, [row], title=f"{title}.{tries}", feedback=False)
        if seen.escalated:
            return bool(seen.rungs["cloud"])
    raise NotTrue(f"{device.name} is sure of every digit")


def _joined(house: House, late: Mapping[str, Sequence[str]]) -> int:
    """How many of these questions the applications can fetch the hub's late answer to."""
    count = 0
    try:
        for device in house.devices:
            with device.client() as client:
                count += sum(client.late(request) is not None for request in late[device.name])
    except OutriderError as error:
        raise NotTrue(f"no late answer can be fetched: {error.message} ({error.code})") from error
    return count


def _labels(house: House) -> int:
    return sum(books.late_labels(house, device) for device in house.devices)


def _mean(values: Iterable[float]) -> float:
    several = list(values)
    return sum(several) / len(several)


def _words(told: Mapping[str, int]) -> str:
    return ", ".join(
        f"{count} {IN_VAIN.get(what, what)}" for what, count in sorted(told.items(), key=lambda pair: -pair[1])
    )
