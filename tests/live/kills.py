"""kill -9 of the agent, the hub and the broker at random moments, while an application records readings.

    python -m tests.live.kills --rounds 100 [--seed 7]

Real processes throughout. A reading that the agent confirmed must be at the hub exactly once when all is quiet again,
in the order in which it was confirmed; one whose confirmation a kill cut off may be there, once. Prints its figures.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from edge_agent.client import Client
from scripts.story.cast import Cloud, Device, Operator
from scripts.story.folder import Folder, claim
from scripts.story.stage import Stage, free_ports, kill_pid
from scripts.story.telling import NotTrue, until
from shared.errors import OutriderError

VICTIMS: Final = ("agent", "hub", "broker")
LONGEST_LIFE_S: Final = 1.0
SETTLED_S: Final = 90.0
PAGE: Final = 500
NAME: Final = "counter"


@dataclass
class Application:
    """Records 0, 1, 2 … as readings, each again until it is confirmed or a kill makes that doubtful."""

    door: Path
    confirmed: list[int] = field(default_factory=list)
    doubtful: set[int] = field(default_factory=set)
    _stop: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        """Go on until `stop`."""
        self._thread = threading.Thread(target=self._run, name="application")
        self._thread.start()

    def stop(self) -> None:
        """No more readings."""
        self._stop.set()
        self._thread.join(30)

    def _run(self) -> None:
        number = 0
        while not self._stop.is_set():
            try:
                with Client(self.door, timeout_ms=5_000) as agent:
                    while not self._stop.is_set():
                        try:
                            agent.reading(NAME, number)
                        except OutriderError:
                            self.doubtful.add(number)
                            raise
                        else:
                            self.confirmed.append(number)
                        finally:
                            number += 1
            except OutriderError:
                time.sleep(0.05)


@dataclass
class Play:
    """The house, and how often each of it was killed."""

    stage: Stage
    cloud: Cloud
    device: Device
    operator: Operator
    chance: random.Random
    kills: Counter[str] = field(default_factory=Counter)

    def set_up(self, folder: Folder) -> None:
        """A hub, and one device that is enrolled."""
        token = folder.operator / "admin.token"
        fingerprint = self.cloud.init(token)["ca_fingerprint"]
        self.cloud.start()
        self.operator.run("login", self.cloud.url, "--token-file", str(token), "--fingerprint", fingerprint)
        made = ("token", "create", "--data", str(self.cloud.folder), "--kind", "join", "--json")
        join = folder.operator / "join.token"
        join.write_text(json.loads(self.stage.run("outrider-hub", *made).out)["token"], encoding="ascii")
        self.device.enrol(join)
        self.device.start()
        self.device.wait_online()

    def kill(self, victim: str) -> None:
        """kill -9 after a random while; what does not come back by itself is started again."""
        time.sleep(self.chance.uniform(0, LONGEST_LIFE_S))
        self.kills[victim] += 1
        match victim:
            case "agent":
                self.stage.kill(self.device.name)
                self.device.start()
            case "hub":
                self.cloud.kill_hub_only()
                self.cloud.start()
                self._hurry()
            case _:
                before = self.cloud.broker_pid
                kill_pid(before)
                until("the hub starts another broker", lambda: self._new_broker(before), seconds=30)
                self._hurry()

    def _new_broker(self, before: int) -> bool:
        self.cloud.broker_pid = self.cloud._find_broker()
        return self.cloud.broker_pid != before

    def _hurry(self) -> None:
        """Only the kills are tried here, not how long a device waits before it connects again."""
        until("the device takes the command", self._flush, seconds=20)

    def _flush(self) -> bool:
        try:
            with self.device.client() as agent:
                agent.control("queue.flush")
        except OutriderError as error:
            raise NotTrue(error.message) from error
        return True

    def stored(self) -> list[int]:
        """The readings at the hub, in the order of their numbers there."""
        found: list[tuple[int, int]] = []
        after = "0"
        while True:
            path = f"/v1/telemetry/{self.device.name}?class=reading&limit={PAGE}&after={after}"
            page: dict[str, Any] = self.operator.hub().get(path, dict[str, Any])
            for item in page["items"]:
                if item["body"]["name"] == NAME:
                    found.append((item["seq"], int(item["body"]["value"])))
            if page["next"] is None:
                return [value for _, value in sorted(found)]
            after = page["next"]


@dataclass(frozen=True)
class Figures:
    """How it went."""

    kills: dict[str, int]
    confirmed: int
    doubtful: int
    stored: int
    lost: int
    twice: int
    in_order: bool


def play(place: Path, *, rounds: int, seed: int) -> Figures:
    """Kill each victim so many times in random order, let all come to rest, and count."""
    folder = claim(place)
    stage = Stage(folder)
    port, broker_port = free_ports(2)
    cloud = Cloud(stage=stage, port=port, broker_port=broker_port)
    device = Device(stage=stage, name="dev", profile="x86-gateway")
    it = Play(stage, cloud, device, Operator(stage=stage), random.Random(seed))
    try:
        it.set_up(folder)
        application = Application(device.door)
        application.start()
        try:
            victims = list(VICTIMS) * rounds
            it.chance.shuffle(victims)
            for victim in victims:
                it.kill(victim)
        finally:
            application.stop()
        device.connect_now()
        until("the hub has everything", device.is_settled, seconds=SETTLED_S)
        stored = it.stored()
    finally:
        stage.stop_all()
    confirmed = set(application.confirmed)
    counts = Counter(stored)
    if unknown := set(counts) - confirmed - application.doubtful:
        raise NotTrue(f"readings that nobody recorded: {sorted(unknown)[:10]}")
    return Figures(
        kills=dict(it.kills),
        confirmed=len(confirmed),
        doubtful=len(application.doubtful),
        stored=len(stored),
        lost=len(confirmed - set(counts)),
        twice=sum(count - 1 for count in counts.values()),
        in_order=stored == sorted(stored),
    )


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="kills of each of the three")
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="or-", dir="/tmp") as place:
        figures = play(Path(place) / "k", rounds=arguments.rounds, seed=arguments.seed)
    print(json.dumps(figures.__dict__, indent=2))
    return 0 if not figures.lost and not figures.twice and figures.in_order else 1


if __name__ == "__main__":
    sys.exit(main())
