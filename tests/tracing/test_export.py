"""Traces from end to end: a request, the job that it makes necessary and the worker that does it, at a collector."""

import gzip
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

import tracing
from protocol.exit_codes import ServiceExit
from tracing.setup import wanted

KEY = "a-key-of-the-tests-that-is-long-enough-0123456789"
TRACE = "0af7651916cd43dd8448eb211c80319c"
CALLER = "b7ad6b7169203331"


class Collector:
    """Takes spans as OTLP over HTTP, as an OpenTelemetry collector does."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Any]] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    named = {each.key: each.value.string_value for each in resource.resource.attributes}
                    spans = [span for scope in resource.scope_spans for span in scope.spans]
                    collector.spans += [(named["service.name"], span) for span in spans]
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def of_the_trace(self, service: str) -> list[Any]:
        return [span for name, span in list(self.spans) if name == service and span.trace_id.hex() == TRACE]

    def requests(self) -> list[Any]:
        """The API's spans of the trace that are requests'; FastAPI makes others within them."""
        return [span for span in self.of_the_trace("cotune-api") if span.kind == span.SPAN_KIND_SERVER]


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.server.shutdown()
    collector.server.server_close()


@pytest.fixture
def start(tmp_path: Path, collector: Collector) -> Iterator[Callable[..., Path]]:
    """Start `python -m <arguments>` with traces on; return its log."""
    processes: list[subprocess.Popen[bytes]] = []
    environment = {
        **os.environ,
        "COTUNE_HOME": str(tmp_path),
        "COTUNE_OPERATOR_KEY": KEY,
        "COTUNE_LOG_FORMAT": "json",
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_BSP_SCHEDULE_DELAY": "200",
    }

    def run(*arguments: str) -> Path:
        log = tmp_path / f"{arguments[0]}.log"
        with log.open("wb") as output:
            command = [sys.executable, "-m", *arguments]
            processes.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))
        return log

    yield run
    for process in processes:
        process.kill()
        process.wait()


def until(look: Callable[[], Any], seconds: float = 250) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)
    return found


def attributes(span: Any) -> dict[str, str]:
    return {each.key: each.value.string_value for each in span.attributes}


def answer(url: str, path: str) -> httpx.Response | None:
    try:
        return httpx.get(f"{url}{path}", trust_env=False)
    except httpx.TransportError:
        return None


@pytest.mark.timeout(600)
def test_a_trace_goes_from_the_caller_through_the_api_and_the_job_to_the_worker(
    start: Callable[..., Path], collector: Collector
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    start("cloud_api", "--port", str(port))
    until(lambda: answer(url, "/ready"))
    created = httpx.post(
        f"{url}/v1/runs",
        headers={"Authorization": f"Bearer {KEY}", "traceparent": f"00-{TRACE}-{CALLER}-01"},
        json={"name": "traced", "rounds": 1, "strategy": {"name": "standalone"}},
        trust_env=False,
        timeout=60,
    )
    assert created.status_code == 201, created.text
    run_id = created.json()["run_id"]
    worker_log = start("worker")
    (request,) = until(collector.requests)
    (job,) = until(lambda: collector.of_the_trace("cotune-worker"))
    assert request.parent_span_id.hex() == CALLER
    assert attributes(request)["cotune.request_id"] == created.headers["X-Request-Id"]
    assert job.parent_span_id in {each.span_id for each in collector.of_the_trace("cotune-api")}
    assert job.name == "prepare_run"
    assert attributes(job)["cotune.run_id"] == run_id
    assert attributes(job)["cotune.job_id"].startswith("job_")
    lines = [json.loads(line) for line in worker_log.read_text().splitlines() if line.startswith("{")]
    assert {line["trace_id"] for line in lines if line.get("run_id") == run_id} == {TRACE}


def test_an_agents_request_names_its_trace(collector: Collector) -> None:
    program = (
        "import os, tracing\n"
        "assert tracing.outgoing_headers() == {}\n"
        "assert tracing.start('cotune-agent', os.environ)\n"
        f"with tracing.span('assignment', parent='00-{TRACE}-{CALLER}-01', run_id='run_1', round_id=None):\n"
        "    print(tracing.outgoing_headers()['traceparent'], tracing.add_trace_id(None, '', {})['trace_id'])\n"
        "tracing.flush()"
    )
    environment = {**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    traceparent, trace_id = done.stdout.split()
    (span,) = collector.of_the_trace("cotune-agent")
    assert (traceparent, trace_id) == (f"00-{TRACE}-{span.span_id.hex()}-01", TRACE)
    assert attributes(span) == {"cotune.run_id": "run_1"}


def test_without_being_asked_it_does_and_imports_nothing() -> None:
    program = (
        "import sys, tracing; assert not tracing.start('x', {})\n"
        "with tracing.span('a', run_id='b'):\n"
        "    tracing.describe({'a': 'b'})\n"
        "    assert (tracing.outgoing_headers(), tracing.current_traceparent()) == ({}, None)\n"
        "assert tracing.add_trace_id(None, '', {'event': 'e'}) == {'event': 'e'}\n"
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize(
    ("environment", "asked"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4318/v1/traces"}, True),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, True),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, False),
        ({"OTEL_SDK_DISABLED": "true", "OTEL_TRACES_EXPORTER": "otlp"}, False),
    ],
)
def test_the_standard_variables_decide(environment: dict[str, str], asked: bool) -> None:
    assert wanted(environment) is asked


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER: expected otlp or none, got 'zipkin'"),
        (
            {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
            "OTEL_EXPORTER_OTLP_PROTOCOL: expected http/protobuf, got 'grpc'",
        ),
    ],
)
def test_what_is_not_supported_is_named(environment: dict[str, str], said: str) -> None:
    with pytest.raises(tracing.TracingUnavailable, match=said):
        tracing.start("x", environment)


@pytest.mark.parametrize("service", ["worker", "cloud_api"])
def test_asked_for_and_not_installed_ends_with_a_line(service: str, tmp_path: Path) -> None:
    hindrance = tmp_path / "hindrance"
    hindrance.mkdir()
    (hindrance / "sitecustomize.py").write_text("import sys\nsys.modules['opentelemetry.sdk.trace'] = None\n")
    environment = {
        **os.environ,
        "COTUNE_HOME": str(tmp_path),
        "COTUNE_OPERATOR_KEY": KEY,
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1",
        "PYTHONPATH": ":".join([str(hindrance), *sys.path]),
    }
    command = [sys.executable, "-m", service, *(["--port", "0"] if service == "cloud_api" else [])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == ServiceExit.SETTINGS
    assert "traces are asked for (OTEL_*)" in done.stderr
    assert "pip install 'cotune[otel]'" in done.stderr
    assert "Traceback" not in done.stderr
