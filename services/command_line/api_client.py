"""The operator's side of the HTTP API, typed: one method an operation."""

from typing import Any, BinaryIO

from command_line.transport import Transport, segment
from protocol.devices import Device, EnrolmentToken, EnrolmentTokenCreate, EnrolmentTokenState
from protocol.events import Event
from protocol.federations import Federation, FederationChange, FederationCreate
from protocol.health import Readiness
from protocol.operators import AuditEntry, OperatorKey, OperatorKeyCreate, OperatorKeyCreated
from protocol.pages import Page
from protocol.runs import ModelVersion, Round, Run, Traffic
from protocol.statuses import DeviceStatus, RunStatus
from protocol.webhooks import CreatedWebhook, Webhook, WebhookCreate


class ApiClient(Transport):
    """Calls the API as an operator. Use as a context manager; what its methods raise is Transport's."""

    def ready(self) -> Readiness:
        """Whether the API and what it needs are up. Does not raise for `not_ready`."""
        return self.parse(self.send("GET", "/ready"), Readiness)

    # Devices

    def create_token(self, request: EnrolmentTokenCreate) -> EnrolmentToken:
        """Make an enrolment token; its secret is in the answer and nowhere else."""
        return self.call("POST", "/v1/enrolment-tokens", EnrolmentToken, json=request.model_dump(mode="json"))

    def list_tokens(self) -> list[EnrolmentTokenState]:
        """Every enrolment token without its secret."""
        return self.items("/v1/enrolment-tokens", EnrolmentTokenState)

    def revoke_token(self, token_id: str) -> EnrolmentTokenState:
        """Let nobody enrol with a token any more."""
        return self.call("DELETE", f"/v1/enrolment-tokens/{segment(token_id)}", EnrolmentTokenState)

    def list_devices(self, *, status: DeviceStatus | None = None, federation: str | None = None) -> list[Device]:
        """Every device, or those in a status or of a federation."""
        return self.items("/v1/devices", Device, status=status, federation=federation)

    def get_device(self, device_id: str) -> Device:
        """One device."""
        return self.call("GET", f"/v1/devices/{segment(device_id)}", Device)

    def approve_device(self, device_id: str) -> Device:
        """Let a device that waits for it take part."""
        return self.call("POST", f"/v1/devices/{segment(device_id)}/approve", Device)

    def revoke_device(self, device_id: str) -> Device:
        """Void a device's credential for ever."""
        return self.call("POST", f"/v1/devices/{segment(device_id)}/revoke", Device)

    # Federations

    def create_federation(self, request: FederationCreate) -> Federation:
        """Make a federation without devices."""
        return self.call("POST", "/v1/federations", Federation, json=request.model_dump(mode="json"))

    def list_federations(self) -> list[Federation]:
        """Every federation in the order of the names."""
        return self.items("/v1/federations", Federation)

    def get_federation(self, name: str) -> Federation:
        """One federation."""
        return self.call("GET", f"/v1/federations/{segment(name)}", Federation)

    def change_federation(self, name: str, change: FederationChange) -> Federation:
        """Change a federation's description."""
        body = change.model_dump(mode="json")
        return self.call("PATCH", f"/v1/federations/{segment(name)}", Federation, json=body)

    def delete_federation(self, name: str) -> None:
        """Delete a federation without runs."""
        self.request("DELETE", f"/v1/federations/{segment(name)}")

    def add_device(self, federation: str, device_id: str) -> Federation:
        """Let a device take part in a federation's runs."""
        return self.call("PUT", f"/v1/federations/{segment(federation)}/devices/{segment(device_id)}", Federation)

    def remove_device(self, federation: str, device_id: str) -> Federation:
        """Give a device no more work of a federation."""
        return self.call("DELETE", f"/v1/federations/{segment(federation)}/devices/{segment(device_id)}", Federation)

    # Operators

    def create_operator_key(self, request: OperatorKeyCreate) -> OperatorKeyCreated:
        """Make an operator's key; its secret is in the answer and nowhere else."""
        return self.call("POST", "/v1/operators/keys", OperatorKeyCreated, json=request.model_dump(mode="json"))

    def list_operator_keys(self) -> list[OperatorKey]:
        """Every operator's key without its secret."""
        return self.items("/v1/operators/keys", OperatorKey)

    def revoke_operator_key(self, key_id: str) -> OperatorKey:
        """Void an operator's key."""
        return self.call("DELETE", f"/v1/operators/keys/{segment(key_id)}", OperatorKey)

    def audit(
        self, *, most: int, key_id: str | None = None, action: str | None = None, subject: str | None = None
    ) -> list[AuditEntry]:
        """The newest entries of the audit trail; of one key, of one action, of one subject."""
        return self.items("/v1/audit", AuditEntry, most=most, key_id=key_id, action=action, subject=subject)

    # Webhooks

    def create_webhook(self, request: WebhookCreate) -> CreatedWebhook:
        """Have events sent to an address; the secret is in the answer and nowhere else."""
        return self.call("POST", "/v1/webhooks", CreatedWebhook, json=request.model_dump(mode="json"))

    def list_webhooks(self) -> list[Webhook]:
        """Every webhook, oldest first."""
        return self.items("/v1/webhooks", Webhook)

    def get_webhook(self, webhook_id: str) -> Webhook:
        """One webhook and how its deliveries go."""
        return self.call("GET", f"/v1/webhooks/{segment(webhook_id)}", Webhook)

    def resume_webhook(self, webhook_id: str) -> Webhook:
        """Try a webhook again now."""
        return self.call("POST", f"/v1/webhooks/{segment(webhook_id)}/resume", Webhook)

    def delete_webhook(self, webhook_id: str) -> Webhook:
        """Tell a webhook nothing any more."""
        return self.call("DELETE", f"/v1/webhooks/{segment(webhook_id)}", Webhook)

    # Runs

    def create_run(self, config: dict[str, Any], *, idempotency_key: str | None = None) -> Run:
        """Create a run. The server checks `config`, so that an older command line can use a newer server's fields."""
        headers = {"Idempotency-Key": idempotency_key} if idempotency_key else {}
        return self.call("POST", "/v1/runs", Run, json=config, headers=headers)

    def list_runs(self, *, status: RunStatus | None = None, federation: str | None = None) -> list[Run]:
        """Every run, newest first, or those in a status or of a federation."""
        return self.items("/v1/runs", Run, status=status, federation=federation)

    def get_run(self, run_id: str) -> Run:
        """One run."""
        return self.call("GET", _run(run_id), Run)

    def stop_run(self, run_id: str, reason: str | None = None) -> Run:
        """End a run; its unfinished round is abandoned."""
        body = {"reason": reason} if reason else {}
        return self.call("POST", f"{_run(run_id)}/stop", Run, json=body)

    def pause_run(self, run_id: str, reason: str | None = None) -> Run:
        """Hold a run."""
        body = {"reason": reason} if reason else {}
        return self.call("POST", f"{_run(run_id)}/pause", Run, json=body)

    def resume_run(self, run_id: str) -> Run:
        """Let a paused run go on."""
        return self.call("POST", f"{_run(run_id)}/resume", Run)

    def retry_run(self, run_id: str) -> Run:
        """Open the round of a failed run again."""
        return self.call("POST", f"{_run(run_id)}/retry", Run)

    def roll_back_run(self, run_id: str, version: int, reason: str | None = None) -> Run:
        """Let the next round start from an earlier version."""
        body = {"version": version} | ({"reason": reason} if reason else {})
        return self.call("POST", f"{_run(run_id)}/rollback", Run, json=body)

    def traffic(self, run_id: str) -> Traffic:
        """Bytes that crossed the network for a run."""
        return self.call("GET", f"{_run(run_id)}/traffic", Traffic)

    def events(self, run_id: str, *, after: int = 0, limit: int = 200) -> list[Event]:
        """The next events of a run after a sequence number; empty when there is none."""
        params = {"after": after, "limit": limit}
        return self.call("GET", f"{_run(run_id)}/events", Page[Event], params=params).items

    # Rounds

    def list_rounds(self, run_id: str) -> list[Round]:
        """Every round of a run, oldest first."""
        rounds = self.items(f"{_run(run_id)}/rounds", Round)
        return sorted(rounds, key=lambda each: (each.number, each.attempt))

    def get_round(self, run_id: str, number: int, *, attempt: int | None = None) -> Round:
        """One round with its devices: its newest attempt, or the one that is named."""
        params = {} if attempt is None else {"attempt": attempt}
        return self.call("GET", f"{_run(run_id)}/rounds/{number}", Round, params=params)

    # Model versions

    def list_versions(self, run_id: str) -> list[ModelVersion]:
        """Every model version of a run, oldest first."""
        versions = self.items(f"{_run(run_id)}/versions", ModelVersion)
        return sorted(versions, key=lambda each: each.number)

    def get_version(self, run_id: str, number: int) -> ModelVersion:
        """One version with its lineage."""
        return self.call("GET", f"{_run(run_id)}/versions/{number}", ModelVersion)

    def model_card(self, run_id: str, number: int) -> str:
        """A version's model card in Markdown."""
        return self.request("GET", f"{_run(run_id)}/versions/{number}/model-card").text

    def download_package(self, run_id: str, number: int, adapter: str, file: BinaryIO) -> None:
        """Write the tar archive of a version's adapter, `llm` or `proxy`, as peft reads it, into `file`."""
        self.download(f"{_run(run_id)}/versions/{number}/adapters/{segment(adapter)}/package", file)


def _run(run_id: str) -> str:
    return f"/v1/runs/{segment(run_id)}"
