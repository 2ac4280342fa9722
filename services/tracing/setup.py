"""Starts and ends the export of spans, as the standard variables say."""

from collections.abc import Mapping
from typing import Any

from tracing import spans

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
FLUSH_SECONDS = 3.0
"""At a process's end; what the collector has not taken by then is lost."""

_providers: list[Any] = []


class TracingUnavailable(ValueError):
    """Traces are asked for and cannot be had."""


def wanted(environment: Mapping[str, str]) -> bool:
    """Whether spans are to be exported.

    Raises:
        TracingUnavailable: they are, but in a way that is not supported.
    """
    exporter = environment.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true" or exporter == "none":
        return False
    if exporter not in ("", "otlp"):
        raise TracingUnavailable(f"OTEL_TRACES_EXPORTER: expected otlp or none, got {exporter!r}")
    if exporter == "" and not any(environment.get(name) for name in ENDPOINTS):
        return False
    protocol = next((environment[name] for name in PROTOCOLS if environment.get(name)), "http/protobuf")
    if protocol != "http/protobuf":
        raise TracingUnavailable(f"{PROTOCOLS[1]}: expected http/protobuf, got {protocol!r}")
    return True


def start(service: str, environment: Mapping[str, str]) -> bool:
    """Export this process's spans if the environment asks for it; return whether it does.

    Args:
        service: the name under which they appear; OTEL_SERVICE_NAME comes first.

    Raises:
        TracingUnavailable: it asks, and the extra `otel` is not installed, or for what is not supported.
    """
    if not wanted(environment):
        return False
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise TracingUnavailable(
            f"traces are asked for (OTEL_*), and {error.name} is not installed: pip install 'cotune[otel]'"
        ) from None
    # The exporter reads its address, headers and timeouts from the standard variables itself.
    provider = TracerProvider(resource=Resource.create({SERVICE_NAME: environment.get("OTEL_SERVICE_NAME") or service}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    _providers.append(provider)
    spans.begin()
    return True


def flush() -> None:
    """Hand over what was not exported yet; wait for that no longer than `FLUSH_SECONDS`."""
    for provider in _providers:
        provider.force_flush(int(FLUSH_SECONDS * 1000))
