"""Who asks too much is told so, and when to come back; nobody else is."""

import time
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from cloud_api.brief_memory import Rate
from cloud_api.security import Rates
from protocol.errors import ErrorCode
from tests.cloud_api.running_api import PLENTY, PROFILE, running_api, settings_in

SLOW = 0.01


def limited(response: httpx.Response) -> None:
    assert (response.status_code, response.json()["code"]) == (429, ErrorCode.RATE_LIMITED), response.text
    assert response.json()["request_id"] == response.headers["X-Request-ID"]
    assert 1 <= int(response.headers["Retry-After"]) <= 1 / SLOW


def test_an_address_is_limited_but_not_who_watches_the_service(home: Path) -> None:
    with running_api(replace(settings_in(home), rates=Rates(address=Rate(SLOW, 5)))) as api:
        answers = [api.operator.get("/v1/runs").status_code for _ in range(6)]
        assert answers == [200] * 5 + [429]
        limited(api.operator.get("/v1/nothing"))
        assert api.operator.get("/health").status_code == 200
        assert api.operator.get("/ready").status_code == 200


def test_a_device_is_limited_and_no_other(home: Path) -> None:
    with running_api(replace(settings_in(home), rates=Rates(device=Rate(SLOW, 3)))) as api:
        greedy, modest = api.enrol("greedy"), api.enrol("modest")
        assert [greedy.http.get("/v1/devices/me").status_code for _ in range(4)] == [200] * 3 + [429]
        limited(greedy.http.get("/v1/devices/me"))
        # Somebody who only claims to be the other device uses up nothing of it.
        stranger = api.client(f"{modest.device_id}.wrong")
        assert {stranger.get("/v1/devices/me").status_code for _ in range(5)} == {401}
        assert modest.http.get("/v1/devices/me").status_code == 200


def test_wrong_credentials_are_limited_for_whom_they_are_claimed(home: Path) -> None:
    rates = Rates(failure=Rate(SLOW, 3))
    with running_api(replace(settings_in(home), rates=rates)) as api:
        device = api.enrol()
        guesser = api.client("cok_guess")
        assert [guesser.get("/v1/runs").status_code for _ in range(4)] == [401] * 3 + [429]
        limited(api.client("another guess").get("/v1/runs"))
        limited(api.operator.get("/v1/runs"))  # From this address no operator's key is looked at for a while.
        assert device.http.get("/v1/devices/me").status_code == 200  # Devices behind it go on.
        stale = api.client(f"{device.device_id}.old")
        assert [stale.get("/v1/devices/me").status_code for _ in range(4)] == [401] * 3 + [429]


def test_enrolments_are_limited(home: Path) -> None:
    with running_api(replace(settings_in(home), rates=Rates(enrolment=Rate(SLOW, 2), failure=PLENTY))) as api:
        body = {"token": "guessed token", "name": "x", "profile": PROFILE}
        http = api.client(None)
        assert [http.post("/v1/devices", json=body).status_code for _ in range(2)] == [401] * 2
        limited(http.post("/v1/devices", json=body))
        assert api.operator.get("/v1/devices").status_code == 200


@pytest.mark.parametrize(
    ("trusted", "forwarded", "same"),
    [
        ((), ("203.0.113.1", "203.0.113.2"), True),
        (("127.0.0.1",), ("203.0.113.1", "203.0.113.2"), False),
        (("127.0.0.0/8",), ("203.0.113.1", "203.0.113.1"), True),
        (("127.0.0.1",), ("198.51.100.9, 203.0.113.1", "198.51.100.8, 203.0.113.1"), True),  # Only the last is known.
    ],
)
def test_an_address_is_believed_from_a_trusted_proxy_only(
    home: Path, trusted: tuple[str, ...], forwarded: tuple[str, str], same: bool
) -> None:
    settings = replace(settings_in(home), rates=Rates(address=Rate(SLOW, 2)), trusted_proxies=trusted)
    with running_api(settings) as api:
        statuses = [
            [api.operator.get("/v1/runs", headers={"X-Forwarded-For": address}).status_code for _ in range(2)]
            for address in forwarded
        ]
        assert statuses == [[200, 200], [429, 429] if same else [200, 200]]


def test_it_passes(home: Path) -> None:
    with running_api(replace(settings_in(home), rates=Rates(address=Rate(0.4, 1)))) as api:
        assert api.operator.get("/v1/runs").status_code == 200
        limited(api.operator.get("/v1/runs"))
        time.sleep(2.6)
        assert api.operator.get("/v1/runs").status_code == 200
