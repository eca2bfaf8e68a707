"""What the devices' applications do all day: ask about a handwritten digit, and tell later what it was.

Every request has an id of its own, so that the books can be compared with the hub's, record by record.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Self, TypeVar

import numpy as np

from shared.errors import OutriderError

from .cast import FAMILY, Device, House
from .digits import INPUT, LABELS
from .telling import NotTrue, require

T = TypeVar("T")

DEADLINE_MS: Final = 5000
EVERYDAY_PAUSE_S: Final = 0.02
TALLY_TITLES: Final = ("device", "asked", "right", "accuracy", "median", "99 %")


@dataclass(slots=True)
class Tally:
    """What one device's application saw.

    Attributes:
        right: answers that were the digit which a person wrote.
        took_us: per answer, from the agent's own clock.
        versions: which model versions answered.
    """

    asked: int = 0
    right: int = 0
    took_us: list[int] = field(default_factory=list)
    versions: set[str] = field(default_factory=set)
    rungs: set[str] = field(default_factory=set)

    def row(self) -> list[object]:
        """For the table."""
        times = [f"{self.took_ms(share):.1f} ms" for share in (0.5, 0.99)]
        return [self.asked, self.right, f"{self.accuracy:.1%}", *times]

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0 to 1."""
        return self.right / self.asked if self.asked else 0.0

    def took_ms(self, share: float) -> float:
        """A quantile of the time per answer, in milliseconds."""
        return float(np.quantile(self.took_us, share)) / 1000 if self.took_us else 0.0


def ask(device: Device, held_back: Any, rows: Iterable[int], *, title: str, feedback: bool = True) -> Tally:
    """Ask one after the other and give feedback; raises NotTrue when a request is refused."""
    tally = Tally()
    try:
        with device.client() as client:
            for row in rows:
                request = f"{title}-{row}"
                truth = LABELS[int(held_back.labels[row])]
                pixels = held_back.pixels[row : row + 1]
                answer = client.infer(FAMILY, {INPUT: pixels}, id=request, deadline_ms=DEADLINE_MS)
                device.answered[request] = str(answer.label)
                tally.asked += 1
                tally.right += answer.label == truth
                tally.took_us.append(answer.took_us)
                tally.versions.add(answer.version)
                tally.rungs.add(answer.rung)
                if feedback:
                    client.feedback(request, label=truth)
                    device.confirmed.add(request)
    except OutriderError as error:
        raise NotTrue(f"{device.name} refused to answer: {error.message} ({error.code})") from error
    return tally


def ask_all(house: House, rows: Sequence[int], *, title: str) -> dict[str, Tally]:
    """All devices at the same time, each asked the same rows; tallies by device."""
    return side_by_side(house.devices, lambda device: ask(device, house.held_back, rows, title=title))


def side_by_side(devices: Sequence[Device], act: Callable[[Device], T]) -> dict[str, T]:
    """Do this for each device in a thread of its own; raises the first failure."""
    done: dict[str, T] = {}
    failed: list[BaseException] = []

    def one(device: Device) -> None:
        try:
            done[device.name] = act(device)
        except NotTrue as error:
            failed.append(error)

    threads = [threading.Thread(target=one, args=(device,), name=device.name) for device in devices]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    if len(done) != len(devices):
        raise NotTrue("an application ended without a result; its trace is above")
    return {device.name: done[device.name] for device in devices}


class Burst:
    """An application that goes on asking, inside a `with`, until the block ends or its agent is gone.

    Attributes:
        asked: questions that were answered.
        versions: which model versions answered.
        cut_off: whether the agent was gone, or refused, while a question was on its way.
    """

    def __init__(self, device: Device, held_back: Any, *, title: str, pause_s: float = 0.0) -> None:
        """Ask about these digits over and over, with a pause after each; `title` keeps the requests' names apart."""
        self._device = device
        self._held_back = held_back
        self._title = title
        self._pause_s = pause_s
        self._enough = threading.Event()
        self.asked = 0
        self.versions: set[str] = set()
        self.cut_off = False
        self._thread = threading.Thread(target=self._run, name=f"burst-{device.name}-{title}")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        """End after the request that is on its way."""
        self._enough.set()
        self._thread.join()

    def _run(self) -> None:
        device, rows = self._device, len(self._held_back.labels)
        with device.client() as client:
            while not self._enough.is_set():
                row = self.asked % rows
                request = f"{self._title}-{self.asked}"
                truth = LABELS[int(self._held_back.labels[row])]
                try:
                    pixels = self._held_back.pixels[row : row + 1]
                    answer = client.infer(FAMILY, {INPUT: pixels}, id=request, deadline_ms=DEADLINE_MS)
                    device.answered[request] = str(answer.label)
                    device.unsure.add(request)
                    self.asked += 1
                    self.versions.add(answer.version)
                    client.feedback(request, label=truth)
                    device.confirmed.add(request)
                    if self._pause_s:
                        self._enough.wait(self._pause_s)
                except OutriderError:
                    # The agent was killed under us; what was on its way has no answer, and that is all we may know.
                    self.cut_off = True
                    return


@contextmanager
def everyday(house: House, *, title: str) -> Iterator[dict[str, Burst]]:
    """All devices' applications ask all the time, unhurriedly, while the block runs; none may go without an answer."""
    with ExitStack() as stack:
        bursts = {
            device.name: stack.enter_context(Burst(device, house.held_back, title=title, pause_s=EVERYDAY_PAUSE_S))
            for device in house.devices
        }
        yield bursts
    for device in house.devices:
        require(not bursts[device.name].cut_off, f"the application of {device.name} got every answer")
        # No agent was killed after its answers, so that every record must reach the hub.
        device.unsure -= {request for request in device.unsure if request.startswith(f"{title}-")}
