"""Counts requests by route and status, and the devices that wait.

One of several processes (`cloud_api.processes`) writes its numbers into a folder that all share, from which any of them
answers for all: prometheus_client does so where `PROMETHEUS_MULTIPROC_DIR` is set when it is imported.
"""

import os

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from starlette.types import Scope

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Buckets of the histogram; a long poll may take a minute."""

UNMATCHED = "unmatched"
"""The route of a request to a path that does not exist: its path itself could be anything."""

SHARED_FOLDER = "PROMETHEUS_MULTIPROC_DIR"


class RequestMetrics:
    """The requests of this process, or of all processes of the service."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "cotune_http_requests", "Answered requests.", ("method", "route", "status"), registry=self._registry
        )
        self.waiting_devices = Gauge(
            "cotune_waiting_devices", "Devices in a long poll.", registry=self._registry, multiprocess_mode="livesum"
        )
        self._seconds = Histogram(
            "cotune_http_request_seconds",
            "From a request's first byte to its answer's last.",
            ("method", "route"),
            buckets=SECONDS,
            registry=self._registry,
        )

    def observe(self, scope: Scope, status: int | None, seconds: float) -> None:
        """Count a request that has ended; `status` None: the client went away before an answer."""
        route = getattr(scope.get("route"), "path", UNMATCHED)
        method = scope["method"] if route != UNMATCHED else "any"
        self._requests.labels(method, route, str(status or "none")).inc()
        self._seconds.labels(method, route).observe(seconds)

    def exposition(self) -> bytes:
        """Return the numbers in Prometheus' text format."""
        if not os.environ.get(SHARED_FOLDER):
            return generate_latest(self._registry)
        everybody = CollectorRegistry()
        MultiProcessCollector(everybody)  # type: ignore[no-untyped-call]
        return generate_latest(everybody)
