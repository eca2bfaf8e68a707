"""The room's figures. Names carry their unit; labels take values from closed sets."""

from __future__ import annotations

from typing import Final

from cloud_hub.ground.metrics import Metrics

BUILD_BUCKETS_S: Final = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 180.0, 600.0, 1800.0)


class Counts:
    """What the room counts.

    Attributes:
        blob_bytes: bytes of uploads that were kept.
        builds: ended builds, by outcome (`ready`, `rejected`).
        build_seconds: how long they took, waiting for their turn not included.
        publications: by outcome (`published`, `repeated`, `refused`).
        patches: tried, by outcome (`made`, `declined` because it saves too little, `failed`).
        assignments_signed: by cause (`assigned`, `renewed`).
        assignments_sent: by outcome (`sent`, `no_link`).
        metadata_expires: when the newest metadata of a role runs out; `families` stands for the earliest of all.
    """

    def __init__(self, metrics: Metrics) -> None:
        self.blob_bytes = metrics.counter("outrider_hub_blob_received_bytes_total", "Bytes of uploads that were kept.")
        self.builds = metrics.counter("outrider_hub_builds_total", "Builds that ended.", ("outcome",))
        self.build_seconds = metrics.histogram(
            "outrider_hub_build_seconds", "Time to build and measure a model.", buckets=BUILD_BUCKETS_S
        )
        self.publications = metrics.counter(
            "outrider_hub_publications_total", "Requests to publish a release.", ("outcome",)
        )
        self.patches = metrics.counter("outrider_hub_patches_total", "Patches that were tried.", ("outcome",))
        self.assignments_signed = metrics.counter(
            "outrider_hub_assignments_signed_total", "Assignments that were signed.", ("cause",)
        )
        self.assignments_sent = metrics.counter(
            "outrider_hub_assignments_sent_total", "Assignments handed to the broker.", ("outcome",)
        )
        self.metadata_expires = metrics.gauge(
            "outrider_hub_metadata_expiry_timestamp_seconds", "When signed metadata runs out, Unix time.", ("role",)
        )
