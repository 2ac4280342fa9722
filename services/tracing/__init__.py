"""Traces with OpenTelemetry, for who wants them: off, and nothing imported, unless the `OTEL_*` variables ask.

Shared by the services, which know nothing else of OpenTelemetry. Spans of our own and FastAPI's; the instrumentation
libraries for SQLAlchemy, Celery and httpx were rejected: all are betas pinned to one release of the SDK, and none knows
that here a job, not a message, carries the work.
"""

from tracing.setup import TracingUnavailable, flush, start, wanted
from tracing.spans import add_trace_id, current_traceparent, describe, outgoing_headers, span

__all__ = [
    "TracingUnavailable",
    "add_trace_id",
    "current_traceparent",
    "describe",
    "flush",
    "outgoing_headers",
    "span",
    "start",
    "wanted",
]
