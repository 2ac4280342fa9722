"""Who may call what, as data: one line an operation. What is not listed here is for admins only.

`action` is the name under which an operator's call is entered in the audit trail; everything that changes something
has one.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from starlette.requests import Request

from protocol.operators import OperatorRole


@dataclass(frozen=True)
class Access:
    """Who may call an operation. Neither operators nor devices: anybody."""

    role: OperatorRole | None = None
    """The least role; None: it is not for operators."""
    devices: bool = False
    """Whether enrolled devices may call it."""
    action: str | None = None


ANYBODY = Access()
DEVICE = Access(devices=True)
VIEWER = Access(OperatorRole.VIEWER)
VIEWER_OR_DEVICE = Access(OperatorRole.VIEWER, devices=True)
OPERATOR = Access(OperatorRole.OPERATOR)
UNLISTED = Access(OperatorRole.ADMIN, action="unlisted")


def operator(action: str) -> Access:
    """What operators may do."""
    return Access(OperatorRole.OPERATOR, action=action)


def admin(action: str | None = None) -> Access:
    """What admins only may do, or read."""
    return Access(OperatorRole.ADMIN, action=action)


ACCESS: Mapping[str, Access] = {
    "GET /health": ANYBODY,
    "GET /ready": ANYBODY,
    "GET /metrics": ANYBODY,
    "POST /v1/devices": ANYBODY,  # The enrolment token is the proof.
    "GET /v1/devices/me": DEVICE,
    "POST /v1/devices/me/heartbeat": DEVICE,
    "POST /v1/devices/me/credential": DEVICE,
    "GET /v1/devices/me/assignment": DEVICE,
    "POST /v1/assignments/{assignment_id}/progress": DEVICE,
    "POST /v1/assignments/{assignment_id}/refusal": DEVICE,
    "GET /v1/assignments/{assignment_id}/last-step": DEVICE,
    "PUT /v1/assignments/{assignment_id}/parts/{kind}": DEVICE,
    "POST /v1/assignments/{assignment_id}/parts/{kind}/uploads": DEVICE,
    "GET /v1/assignments/{assignment_id}/parts/{kind}/uploads/{upload_id}": DEVICE,
    "PATCH /v1/assignments/{assignment_id}/parts/{kind}/uploads/{upload_id}": DEVICE,
    "POST /v1/assignments/{assignment_id}/parts/{kind}/uploads/{upload_id}/completion": DEVICE,
    "POST /v1/assignments/{assignment_id}/submission": DEVICE,
    "GET /v1/assignments/{assignment_id}/submission": DEVICE,
    "GET /v1/artifacts/{sha256}": VIEWER_OR_DEVICE,
    "HEAD /v1/artifacts/{sha256}": VIEWER_OR_DEVICE,
    "GET /v1/devices": VIEWER,
    "GET /v1/devices/{device_id}": VIEWER,
    "POST /v1/devices/{device_id}/approve": operator("device.approve"),
    "POST /v1/devices/{device_id}/revoke": operator("device.revoke"),
    "GET /v1/enrolment-tokens": VIEWER,
    "POST /v1/enrolment-tokens": operator("enrolment_token.create"),
    "DELETE /v1/enrolment-tokens/{token_id}": operator("enrolment_token.revoke"),
    "GET /v1/runs": VIEWER,
    "POST /v1/runs": operator("run.create"),
    "GET /v1/runs/{run_id}": VIEWER,
    "POST /v1/runs/{run_id}/stop": operator("run.stop"),
    "POST /v1/runs/{run_id}/pause": operator("run.pause"),
    "POST /v1/runs/{run_id}/resume": operator("run.resume"),
    "POST /v1/runs/{run_id}/retry": operator("run.retry"),
    "POST /v1/runs/{run_id}/rollback": operator("run.rollback"),
    "GET /v1/runs/{run_id}/traffic": VIEWER,
    "GET /v1/runs/{run_id}/rounds": VIEWER,
    "GET /v1/runs/{run_id}/rounds/{number}": VIEWER,
    "GET /v1/runs/{run_id}/events": VIEWER,
    "GET /v1/runs/{run_id}/events/stream": VIEWER,
    "GET /v1/runs/{run_id}/versions": VIEWER,
    "GET /v1/runs/{run_id}/versions/{number}": VIEWER,
    "GET /v1/runs/{run_id}/versions/{number}/adapters/{adapter}": VIEWER,
    "GET /v1/runs/{run_id}/versions/{number}/model-card": VIEWER,
    "GET /v1/runs/{run_id}/versions/{number}/adapters/{adapter}/package": VIEWER,
    "GET /v1/federations": VIEWER,
    "POST /v1/federations": operator("federation.create"),
    "GET /v1/federations/{federation}": VIEWER,
    "PATCH /v1/federations/{federation}": operator("federation.change"),
    "DELETE /v1/federations/{federation}": operator("federation.delete"),
    "PUT /v1/federations/{federation}/devices/{device_id}": operator("federation.add_device"),
    "DELETE /v1/federations/{federation}/devices/{device_id}": operator("federation.remove_device"),
    "GET /v1/webhooks": OPERATOR,  # Often the address itself is the receiver's secret.
    "POST /v1/webhooks": admin("webhook.create"),  # It makes this server call any address.
    "GET /v1/webhooks/{webhook_id}": OPERATOR,
    "DELETE /v1/webhooks/{webhook_id}": admin("webhook.delete"),
    "POST /v1/webhooks/{webhook_id}/resume": operator("webhook.resume"),
    "GET /v1/operators/keys": admin(),
    "POST /v1/operators/keys": admin("operator_key.create"),
    "DELETE /v1/operators/keys/{key_id}": admin("operator_key.revoke"),
    "GET /v1/audit": admin(),
}


def access_of(request: Request) -> Access:
    """Return who may call the operation that a request was routed to."""
    route = request.scope.get("route")
    return ACCESS.get(f"{request.method} {getattr(route, 'path', '')}", UNLISTED)
