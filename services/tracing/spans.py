"""Spans, and how a trace goes on elsewhere. All of it does nothing until `begin`."""

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

PREFIX = "cotune."
"""Of our attributes: `cotune.run_id`, `cotune.round_id`, `cotune.device_id`, ..."""

_active = False


def begin() -> None:
    """Make spans from now on. The SDK is set up."""
    global _active  # noqa: PLW0603 - as global as the tracer provider
    _active = True


@contextmanager
def span(name: str, *, parent: str | None = None, **attributes: str | None) -> Iterator[None]:
    """Do the block in a span; one that raises is marked as failed.

    Args:
        parent: a `traceparent` (W3C Trace Context) of another process; without it the current span is the parent.
        attributes: ids; None leaves one out.
    """
    if not _active:
        yield
        return
    from opentelemetry import propagate, trace

    context = propagate.extract({"traceparent": parent}) if parent else None
    known = {f"{PREFIX}{key}": value for key, value in attributes.items() if value is not None}
    with trace.get_tracer("cotune").start_as_current_span(name, context=context, attributes=known):
        yield


def describe(attributes: Mapping[str, str]) -> None:
    """Add ids to the current span."""
    if _active:
        from opentelemetry import trace

        trace.get_current_span().set_attributes({f"{PREFIX}{key}": value for key, value in attributes.items()})


def outgoing_headers() -> dict[str, str]:
    """Return the headers (`traceparent`) with which a request goes on with the current trace; none without one."""
    headers: dict[str, str] = {}
    if _active:
        from opentelemetry import propagate

        propagate.inject(headers)
    return headers


def current_traceparent() -> str | None:
    """Return the current span's `traceparent`, to be stored with work that is done later."""
    return outgoing_headers().get("traceparent")


def add_trace_id(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A structlog processor: name the current trace in each line."""
    if _active:
        from opentelemetry import trace

        context = trace.get_current_span().get_span_context()
        if context.is_valid:
            event["trace_id"] = format(context.trace_id, "032x")
    return event
