"""The operator's side of the HTTP API, typed, with every failure as one of our errors."""

import ssl
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote, urlsplit

import httpx
from pydantic import BaseModel, TypeAdapter, ValidationError

from command_line.errors import BadInput, CommandError, NotAuthorised, Refused, Unreachable
from protocol import PROTOCOL_VERSION
from protocol.devices import Device, EnrolmentToken, EnrolmentTokenCreate, EnrolmentTokenState
from protocol.errors import ErrorCode, Problem
from protocol.events import Event
from protocol.headers import PROTOCOL_HEADER
from protocol.health import Readiness
from protocol.operators import AuditEntry, OperatorKey, OperatorKeyCreate, OperatorKeyCreated
from protocol.pages import Page
from protocol.runs import ModelVersion, Round, Run, Traffic

Schema = TypeVar("Schema", bound=BaseModel)


class ApiClient:
    """Calls the API as an operator. Use as a context manager.

    Every method raises Unreachable when the API does not answer, NotAuthorised when it does not accept the
    key, and Refused when it says no.
    """

    def __init__(
        self, server: str, key: str, *, timeout_seconds: float = 15.0, tls: ssl.SSLContext | None = None
    ) -> None:
        parts = urlsplit(server)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BadInput(f"expected a server address such as http://127.0.0.1:8000, got {server!r}")
        self.server = server.rstrip("/")
        # The machine's proxy settings are for the world outside; a service on this machine is reached directly.
        local = parts.hostname in ("127.0.0.1", "localhost", "::1")
        self._http = httpx.Client(
            base_url=self.server,
            headers={"Authorization": f"Bearer {key}", PROTOCOL_HEADER: PROTOCOL_VERSION},
            timeout=timeout_seconds,
            trust_env=not local,
            verify=True if tls is None else tls,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def ready(self) -> Readiness:
        """Whether the API and what it needs are up. Does not raise for `not_ready`."""
        response = self._send("GET", "/ready")
        return self._parse(response, Readiness)

    def create_token(self, request: EnrolmentTokenCreate) -> EnrolmentToken:
        """Make an enrolment token; its secret is in the answer and nowhere else."""
        return self._call("POST", "/v1/enrolment-tokens", EnrolmentToken, json=request.model_dump(mode="json"))

    def list_tokens(self) -> list[EnrolmentTokenState]:
        """Every enrolment token without its secret, page by page."""
        return self._all("/v1/enrolment-tokens", EnrolmentTokenState)

    def revoke_token(self, token_id: str) -> EnrolmentTokenState:
        """Let nobody enrol with a token any more."""
        return self._call("DELETE", f"/v1/enrolment-tokens/{_segment(token_id)}", EnrolmentTokenState)

    def approve_device(self, device_id: str) -> Device:
        """Let a device that waits for it take part."""
        return self._call("POST", f"/v1/devices/{_segment(device_id)}/approve", Device)

    def revoke_device(self, device_id: str) -> Device:
        """Void a device's credential for ever."""
        return self._call("POST", f"/v1/devices/{_segment(device_id)}/revoke", Device)

    def create_operator_key(self, request: OperatorKeyCreate) -> OperatorKeyCreated:
        """Make an operator's key; its secret is in the answer and nowhere else."""
        return self._call("POST", "/v1/operators/keys", OperatorKeyCreated, json=request.model_dump(mode="json"))

    def list_operator_keys(self) -> list[OperatorKey]:
        """Every operator's key without its secret, page by page."""
        return self._all("/v1/operators/keys", OperatorKey)

    def revoke_operator_key(self, key_id: str) -> OperatorKey:
        """Void an operator's key."""
        return self._call("DELETE", f"/v1/operators/keys/{_segment(key_id)}", OperatorKey)

    def audit(self, *, limit: int, subject: str | None = None) -> list[AuditEntry]:
        """The newest entries of the audit trail, optionally of one subject."""
        params: dict[str, str | int] = {"limit": limit} | ({"subject": subject} if subject else {})
        return self._call("GET", "/v1/audit", Page[AuditEntry], params=params).items

    def list_devices(self) -> list[Device]:
        """Every device, page by page."""
        return self._all("/v1/devices", Device)

    def create_run(self, config: dict[str, Any], *, idempotency_key: str | None = None) -> Run:
        """Create a run. The server checks `config`, so that an older command line can use a newer server's fields."""
        headers = {"Idempotency-Key": idempotency_key} if idempotency_key else {}
        return self._call("POST", "/v1/runs", Run, json=config, headers=headers)

    def list_runs(self) -> list[Run]:
        """Every run, page by page."""
        return self._all("/v1/runs", Run)

    def get_run(self, run_id: str) -> Run:
        """One run."""
        return self._call("GET", f"/v1/runs/{_segment(run_id)}", Run)

    def stop_run(self, run_id: str, reason: str | None = None) -> Run:
        """End a run; its unfinished round is abandoned."""
        body = {"reason": reason} if reason else {}
        return self._call("POST", f"/v1/runs/{_segment(run_id)}/stop", Run, json=body)

    def pause_run(self, run_id: str, reason: str | None = None) -> Run:
        """Hold a run."""
        body = {"reason": reason} if reason else {}
        return self._call("POST", f"/v1/runs/{_segment(run_id)}/pause", Run, json=body)

    def resume_run(self, run_id: str) -> Run:
        """Let a paused run go on."""
        return self._call("POST", f"/v1/runs/{_segment(run_id)}/resume", Run)

    def retry_run(self, run_id: str) -> Run:
        """Open the round of a failed run again."""
        return self._call("POST", f"/v1/runs/{_segment(run_id)}/retry", Run)

    def roll_back_run(self, run_id: str, version: int, reason: str | None = None) -> Run:
        """Let the next round start from an earlier version."""
        body = {"version": version} | ({"reason": reason} if reason else {})
        return self._call("POST", f"/v1/runs/{_segment(run_id)}/rollback", Run, json=body)

    def list_rounds(self, run_id: str) -> list[Round]:
        """Every round of a run, oldest first."""
        rounds = self._all(f"/v1/runs/{_segment(run_id)}/rounds", Round)
        return sorted(rounds, key=lambda each: (each.number, each.attempt))

    def get_round(self, run_id: str, number: int) -> Round:
        """One round with its devices."""
        return self._call("GET", f"/v1/runs/{_segment(run_id)}/rounds/{number}", Round)

    def list_versions(self, run_id: str) -> list[ModelVersion]:
        """Every model version of a run, oldest first."""
        versions = self._all(f"/v1/runs/{_segment(run_id)}/versions", ModelVersion)
        return sorted(versions, key=lambda each: each.number)

    def traffic(self, run_id: str) -> Traffic:
        """Bytes that crossed the network for a run."""
        return self._call("GET", f"/v1/runs/{_segment(run_id)}/traffic", Traffic)

    def events(self, run_id: str, *, after: int = 0, limit: int = 200) -> list[Event]:
        """The next events of a run after a sequence number; empty when there is none."""
        response = self._request("GET", f"/v1/runs/{_segment(run_id)}/events", params={"after": after, "limit": limit})
        payload = response.json()
        items = payload["items"] if isinstance(payload, dict) else payload
        return TypeAdapter(list[Event]).validate_python(items)

    def _all(self, path: str, schema: type[Schema]) -> list[Schema]:
        items: list[Schema] = []
        params: dict[str, str | int] = {}
        while True:
            page = self._call("GET", path, Page[schema], params=params)  # type: ignore[valid-type]
            items += page.items
            if page.next_cursor is None:
                return items
            params["cursor"] = page.next_cursor

    def _call(self, method: str, path: str, schema: type[Schema], **arguments: Any) -> Schema:
        return self._parse(self._request(method, path, **arguments), schema)

    def _request(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        response = self._send(method, path, **arguments)
        if response.is_success:
            return response
        raise self._failure(response)

    def _send(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        try:
            return self._http.request(method, path, **arguments)
        except httpx.HTTPError as error:
            raise Unreachable(
                f"cannot reach the API at {self.server}: {error or type(error).__name__}",
                next_step="start it with `cotune up`, or give its address with --server or COTUNE_SERVER",
            ) from None

    def _parse(self, response: httpx.Response, schema: type[Schema]) -> Schema:
        try:
            return schema.model_validate_json(response.content)
        except ValidationError:
            raise Unreachable(
                f"expected a Cotune API at {self.server}, got an answer of {response.status_code} that is not one",
                next_step="check --server and COTUNE_SERVER",
            ) from None

    def _failure(self, response: httpx.Response) -> CommandError:
        try:
            problem = Problem.model_validate_json(response.content)
        except ValidationError:
            return Unreachable(f"{self.server} answered {response.status_code} {response.reason_phrase}")
        message = problem.detail
        if problem.code is ErrorCode.INVALID_FIELD and problem.errors:  # of which the detail names the first only
            lines = [
                f"  {each.field}: {each.message}" + ("" if each.received is None else f", got {each.received!r}")
                for each in problem.errors
            ]
            message = "\n".join([f"{len(lines)} wrong field(s)", *lines])
        if response.status_code in (401, 403):
            return NotAuthorised(message, next_step="check COTUNE_OPERATOR_KEY or COTUNE_OPERATOR_KEY_FILE")
        if response.status_code >= 500:
            return Unreachable(f"{message} (request {problem.request_id or '?'})")
        return Refused(message, code=problem.code)


def _segment(value: str) -> str:
    return quote(value, safe="")
