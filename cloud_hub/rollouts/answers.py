"""What was seen of a release on devices: counts of answers, and how long they took.

Not here: where figures come from (the telemetry room), what follows from them (gates.py, latency.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

from shared.ids import DeviceId
from shared.sketch import Sketch


class Answers(msgspec.Struct, frozen=True):
    """What was seen of one version on one device.

    Attributes:
        answered: requests that got an answer.
        right, wrong: answers of which the application said so.
        latency: microseconds.
    """

    answered: int = 0
    right: int = 0
    wrong: int = 0
    latency: Sketch = Sketch()

    @property
    def good(self) -> int:
        """Answers not known to be wrong."""
        return self.answered - self.wrong

    @property
    def told(self) -> int:
        """Answers of which it is known whether they were right."""
        return self.right + self.wrong


class Expected(msgspec.Struct, frozen=True):
    """What one device would do with a release as good as the one before.

    Attributes:
        share: of its answers that are wrong.
        weight: for how many answers that share counts; the fewer, the more the device may differ from it by itself.
    """

    share: float
    weight: float


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """Figures by device.

    Attributes:
        new: of the release.
        old: of what the device ran before it, or still runs.
        during: of what a device still runs, since the rollout began: the control.
        expected: of the devices that were offered the release, as soon as that is known.
        profiles: of every device that is named above.
    """

    new: Mapping[DeviceId, Answers] = {}
    old: Mapping[DeviceId, Answers] = {}
    during: Mapping[DeviceId, Answers] = {}
    expected: Mapping[DeviceId, Expected] = {}
    profiles: Mapping[DeviceId, str] = {}


NOTHING_SEEN: Final = Answers()
