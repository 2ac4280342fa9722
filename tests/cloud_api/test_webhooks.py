"""Webhooks over HTTP. Deliveries are tested where they are made: tests/worker/test_webhook_sender.py."""

from protocol.operators import OperatorRole
from tests.cloud_api.running_api import RunningApi


def test_a_webhook_is_made_shown_resumed_and_deleted(api: RunningApi) -> None:
    body = {"url": "https://ops.example/hook", "types": ["run.status_changed"], "note": "pager"}
    created = api.operator.post("/v1/webhooks", json=body)
    assert created.status_code == 201, created.text
    assert created.json()["secret"].startswith("whsec_")
    webhook_id = created.json()["webhook_id"]
    path = f"/v1/webhooks/{webhook_id}"
    shown = api.operator.get(path).json()
    assert "secret" not in shown
    assert (shown["url"], shown["types"], shown["active"]) == (body["url"], body["types"], True)
    assert webhook_id in {each["webhook_id"] for each in api.operator.get("/v1/webhooks").json()["items"]}
    assert api.operator.post(f"{path}/resume").json() == shown
    assert api.operator.delete(path).json() == shown
    for answer in (api.operator.get(path), api.operator.delete(path), api.operator.post(f"{path}/resume")):
        assert answer.status_code == 404
        assert answer.json()["code"] == "webhook_not_found"


def test_pages(fresh_api: RunningApi) -> None:
    made = [
        fresh_api.operator.post("/v1/webhooks", json={"url": f"http://ops.example/{number}"}).json()["webhook_id"]
        for number in range(3)
    ]
    first = fresh_api.operator.get("/v1/webhooks", params={"limit": 2}).json()
    rest = fresh_api.operator.get("/v1/webhooks", params={"limit": 2, "cursor": first["next_cursor"]}).json()
    assert sorted(made) == [each["webhook_id"] for each in first["items"] + rest["items"]]
    assert rest["next_cursor"] is None


def test_bad_requests_are_refused(api: RunningApi) -> None:
    for body in (
        {"url": "ftp://ops.example"},
        {"url": "not an address"},
        {"url": "https://ops.example", "types": []},
        {"url": "https://ops.example", "types": ["no.such"]},
        {},
    ):
        assert api.operator.post("/v1/webhooks", json=body).status_code == 422, body
    assert api.client(None).post("/v1/webhooks", json={"url": "https://ops.example"}).status_code == 401
    device = api.enrol()
    assert device.http.get("/v1/webhooks").status_code == 403


def test_viewers_do_not_see_addresses_which_may_be_secrets(api: RunningApi) -> None:
    created = api.operator.post("/v1/webhooks", json={"url": "https://ops.example/services/T0/whoever-knows-it"}).json()
    for role, status in ((OperatorRole.VIEWER, 403), (OperatorRole.OPERATOR, 200)):
        client = api.client(api.operator_key(role))
        for path in ("/v1/webhooks", f"/v1/webhooks/{created['webhook_id']}"):
            answer = client.get(path)
            assert answer.status_code == status, path
            assert ("whoever-knows-it" in answer.text) == (status == 200)
