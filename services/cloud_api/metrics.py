"""Numbers for a monitoring system, in Prometheus' text format.

Requests are counted as they come; how many runs, devices and jobs there are is read from the database when asked.
"""

from collections.abc import Iterable, Mapping

from fastapi import APIRouter
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.responses import Response

from cloud_api.cloud import Cloud
from cloud_api.dependencies import CloudHere
from cloud_api.documentation import answers
from persistence.counts import Counts, count_everything
from protocol.errors import DomainError
from protocol.statuses import AssignmentStatus

router = APIRouter(tags=["service"])

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OUTCOMES = (
    AssignmentStatus.COUNTED,
    AssignmentStatus.QUARANTINED,
    AssignmentStatus.REJECTED,
    AssignmentStatus.LATE,
    AssignmentStatus.LOST,
)
"""What becomes of an update. A lost one may still come, and a late one be counted: none of these only grows."""

_EXAMPLE = """\
# HELP cotune_devices Enrolled devices.
# TYPE cotune_devices gauge
cotune_devices{status="registered"} 3.0
"""


class _Snapshot(Collector):
    """Metrics made once, as a collector."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = list(metrics)

    def collect(self) -> Iterable[Metric]:
        return self._metrics


@router.get(
    "/metrics",
    summary="Numbers for Prometheus",
    response_class=Response,
    responses=answers(
        None,
        also={
            200: {
                "description": "Prometheus' text format, version 0.0.4.",
                "content": {"text/plain": {"schema": {"type": "string"}, "example": _EXAMPLE}},
            }
        },
    ),
)
async def show_metrics(cloud: CloudHere) -> Response:
    """Requests by route and status, devices that wait; how many runs, rounds, devices, jobs and updates there are.

    No credential is asked for, and there are only counts in it; a proxy that faces the outside should not pass it on.
    """
    counts = await cloud.counts.get(lambda: _count(cloud))
    service = CollectorRegistry()
    service.register(_Snapshot(_of_the_service(counts)))
    return Response(cloud.request_metrics.exposition() + generate_latest(service), media_type=MEDIA_TYPE)


async def _count(cloud: Cloud) -> Counts | None:
    try:
        return await cloud.transactions.read_at_once(count_everything)
    except DomainError:
        return None


def _of_the_service(counts: Counts | None) -> Iterable[Metric]:
    yield GaugeMetricFamily("cotune_database_up", "Whether the database answers.", float(counts is not None))
    if counts is None:
        return
    age = counts.sweep_age_seconds
    yield GaugeMetricFamily("cotune_sweep_age_seconds", "Seconds since a controller swept; +Inf: none has.", age)
    yield _by_status("cotune_runs", "Runs.", counts.runs)
    yield _by_status("cotune_rounds", "Rounds.", counts.rounds)
    yield _by_status("cotune_devices", "Enrolled devices.", counts.devices)
    yield _by_status("cotune_assignments", "Devices' shares of rounds.", counts.assignments)
    jobs = GaugeMetricFamily("cotune_jobs", "Jobs for workers.", labels=("kind", "status"))
    _fill(jobs, counts.jobs)
    yield jobs
    updates = GaugeMetricFamily("cotune_updates", "Updates, by what became of them.", labels=("outcome",))
    _fill(updates, {(outcome.value,): counts.assignments[outcome] for outcome in OUTCOMES})
    yield updates
    moved = CounterMetricFamily("cotune_bytes", "Bytes of bodies to and from devices.", labels=("direction", "kind"))
    _fill(moved, counts.num_bytes)
    yield moved


def _by_status(name: str, text: str, statuses: Mapping[str, int]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=("status",))
    _fill(family, {(status,): number for status, number in statuses.items()})
    return family


def _fill(family: GaugeMetricFamily | CounterMetricFamily, values: Mapping[tuple[str, ...], int]) -> None:
    for labels, number in values.items():
        family.add_metric(labels, number)
