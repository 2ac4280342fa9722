"""Counts the requests of this process, by route and status."""

from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.types import Scope

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Buckets of the histogram; a long poll may take a minute."""

UNMATCHED = "unmatched"
"""The route of a request to a path that does not exist: its path itself could be anything."""


class RequestMetrics:
    """The requests of this process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "cotune_http_requests", "Answered requests.", ("method", "route", "status"), registry=self.registry
        )
        self._seconds = Histogram(
            "cotune_http_request_seconds",
            "From a request's first byte to its answer's last.",
            ("method", "route"),
            buckets=SECONDS,
            registry=self.registry,
        )

    def observe(self, scope: Scope, status: int | None, seconds: float) -> None:
        """Count a request that has ended; `status` None: the client went away before an answer."""
        route = getattr(scope.get("route"), "path", UNMATCHED)
        method = scope["method"] if route != UNMATCHED else "any"
        self._requests.labels(method, route, str(status or "none")).inc()
        self._seconds.labels(method, route).observe(seconds)
