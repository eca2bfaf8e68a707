"""What is expected of a device from its own past and from the devices like it.

A device has a share of wrong answers of its own (a dirty lens, a dark corner). The shares of devices of one profile
are taken as drawn from a beta distribution with a mean and a weight, both measured: devices that differ much give a
small weight, and then a device's own past says nearly all. Of the weights the smallest is taken that the figures do not
speak against (profile likelihood, one-sided 95 %), and what is not known of the mean makes the expectation wider: luck
before the rollout must not make a release look bad.

Not here: when an expectation is made and kept (evidence.py), the test that uses it (gates.py).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from cloud_hub.rollouts.answers import Answers, Expected

UPPER_Z: Final = 1.645
WEIGHTS: Final = (10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0)
"""Weights that are tried; with the largest, devices hardly differ."""
SPEAKS_AGAINST: Final = 1.35
"""Half the 90 % point of chi squared with one degree of freedom: 95 % on one side."""


class Likeness(msgspec.Struct, frozen=True):
    """What devices have in common.

    Attributes:
        share: the mean of their shares.
        weight: for how many answers that mean counts beside a device's own.
        worth: the answers that the mean rests on, counted as if each came from another device.
    """

    share: float
    weight: float
    worth: float


def likeness(pasts: Sequence[Answers]) -> Likeness:
    """What the devices with these pasts have in common; there must be answers with a known outcome."""
    counts = Counter((past.wrong, past.told) for past in pasts if past.told)
    wrong = sum(bad * number for (bad, _), number in counts.items())
    told = sum(each * number for (_, each), number in counts.items())
    mean = (wrong + 0.5) / (told + 1)
    fits = {
        weight: sum(number * log_chance(bad, each - bad, mean, weight) for (bad, each), number in counts.items())
        for weight in WEIGHTS
    }
    weight = min(_not_spoken_against(fits))
    # Answers of one device are alike, so many of them say less of the mean than as many from different devices.
    worth = sum(number * each * (weight + 1) / (weight + each) for (_, each), number in counts.items())
    return Likeness(mean, weight, worth)


def expect(past: Answers, like: Likeness) -> Expected:
    """What is expected of a device with this past among devices like these.

    One whose own past speaks against their likeness is an exception: for it they weigh less.
    """
    fits = {
        weight: log_chance(past.wrong, past.right, like.share, weight) for weight in WEIGHTS if weight <= like.weight
    }
    trusted = max(_not_spoken_against(fits))
    weight = trusted + past.told
    share = (trusted * like.share + past.wrong) / weight
    spread = share * (1 - share)
    of_mean = (trusted / weight) ** 2 * like.share * (1 - like.share) / max(1.0, like.worth)
    return Expected(share, max(1.0, spread / (spread / (weight + 1) + of_mean) - 1))


def _not_spoken_against(fits: Mapping[float, float]) -> list[float]:
    best = max(fits.values())
    return [weight for weight, fit in fits.items() if fit >= best - SPEAKS_AGAINST]


def log_chance(bad: int, good: int, share: float, weight: float) -> float:
    """Log of the chance of these answers in this order, for a device whose share is beta with this mean and weight.

    The order is the same in every comparison, so it is left out (no binomial coefficient).
    """
    a, b = share * weight, (1 - share) * weight
    return (
        math.lgamma(a + bad)
        - math.lgamma(a)
        + math.lgamma(b + good)
        - math.lgamma(b)
        + math.lgamma(weight)
        - math.lgamma(weight + bad + good)
    )


def wilson_upper(bad: float, count: float, *, z: float = UPPER_Z) -> float:
    """Upper end of Wilson's interval for a share (1927); 1.0 when nothing was counted."""
    if count <= 0:
        return 1.0
    share, z2 = bad / count, z * z
    middle = share + z2 / (2 * count)
    return (middle + z * math.sqrt(max(0.0, share * (1 - share)) / count + z2 / (4 * count * count))) / (1 + z2 / count)
