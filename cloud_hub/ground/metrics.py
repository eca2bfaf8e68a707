"""Counters and gauges, in a registry of the hub's own. Built by the composition root and handed to who counts.

Names carry their unit (`_seconds`, `_bytes`, `_total`); labels take values from closed sets, never from outside.
"""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """A registry and the figures that the ground itself keeps.

    Attributes:
        messages: MQTT messages from devices by leaf (`other` for unknown ones) and outcome.
        requests: HTTP requests by method, route template and status.
        request_seconds: how long they took, by route template.
        devices_online: devices that were born and have not died.
        broker_restarts: how often the managed broker had to be started again.
        link_up: 1 while the hub is connected to the broker.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.messages = self.counter("outrider_hub_messages_total", "MQTT messages from devices.", ("leaf", "outcome"))
        self.requests = self.counter("outrider_hub_requests_total", "HTTP requests.", ("method", "route", "status"))
        self.request_seconds = self.histogram(
            "outrider_hub_request_seconds", "Time to answer an HTTP request.", ("route",)
        )
        self.devices_online = self.gauge("outrider_hub_devices_online", "Devices that are connected.")
        self.broker_restarts = self.counter(
            "outrider_hub_broker_restarts_total", "Starts of the broker after the first."
        )
        self.link_up = self.gauge("outrider_hub_link_up", "1 while the hub is connected to the broker.")

    def counter(self, name: str, documentation: str, labels: tuple[str, ...] = ()) -> Counter:
        """A counter of this registry; the name ends in `_total`."""
        return Counter(name, documentation, labels, registry=self.registry)

    def gauge(self, name: str, documentation: str, labels: tuple[str, ...] = ()) -> Gauge:
        """A gauge of this registry."""
        return Gauge(name, documentation, labels, registry=self.registry)

    def histogram(
        self,
        name: str,
        documentation: str,
        labels: tuple[str, ...] = (),
        *,
        buckets: tuple[float, ...] = Histogram.DEFAULT_BUCKETS,
    ) -> Histogram:
        """A histogram of this registry; the name ends in its unit."""
        return Histogram(name, documentation, labels, registry=self.registry, buckets=buckets)

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)
