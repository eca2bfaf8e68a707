"""The room's figures. Names carry their unit; labels take values from closed sets."""

from __future__ import annotations

from typing import Final

from cloud_hub.ground.metrics import Metrics

ROUND_BUCKETS_S: Final = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 7200.0)


class Counts:
    """What the room counts.

    Attributes:
        runs: runs that ended, by state.
        active: runs that have not ended.
        round_seconds: how long finished rounds took, from the first task to the stored result.
        tasks: tasks handed to the broker, by outcome (`sent`, `no_link`); a repetition counts again.
        replies: answers of devices, by outcome (`taken`, `repeated`, `late`, `unknown`).
        workers_lost: how often a worker ended by itself.
    """

    def __init__(self, metrics: Metrics) -> None:
        self.runs = metrics.counter("outrider_hub_round_runs_total", "Federated runs that ended.", ("state",))
        self.active = metrics.gauge("outrider_hub_round_runs_active", "Federated runs that have not ended.")
        self.round_seconds = metrics.histogram(
            "outrider_hub_round_seconds", "Time of a federated round.", buckets=ROUND_BUCKETS_S
        )
        self.tasks = metrics.counter(
            "outrider_hub_round_tasks_total", "Tasks of federated rounds handed to the broker.", ("outcome",)
        )
        self.replies = metrics.counter(
            "outrider_hub_round_replies_total", "Answers of devices to federated rounds.", ("outcome",)
        )
        self.workers_lost = metrics.counter(
            "outrider_hub_round_workers_lost_total", "Workers of federated runs that ended by themselves."
        )
