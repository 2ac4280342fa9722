"""What docker-compose.yml and the files beside it promise, read from them. That they work: `make compose-test`."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
ONE_SHOT = {"migrate", "certificates", "demo-seed"}


@pytest.mark.parametrize("name", SERVICES)
def test_nobody_is_root_and_nothing_is_written_but_to_volumes_and_memory(name: str) -> None:
    service = SERVICES[name]
    user, _, _ = service["user"].partition(":")
    assert int(user) > 0
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["mem_limit"]
    assert service["restart"] == ("on-failure" if name in ONE_SHOT else "unless-stopped")


@pytest.mark.parametrize("name", sorted(set(SERVICES) - ONE_SHOT - {each for each in SERVICES if "agent" in each}))
def test_every_service_that_answers_somebody_has_a_health_check(name: str) -> None:
    if name.startswith("demo-"):
        assert "healthcheck" not in SERVICES[name], "an agent answers nobody; the API knows when it was last heard from"
    else:
        assert SERVICES[name]["healthcheck"]["test"]


def test_no_secret_is_in_an_environment_and_each_is_a_file() -> None:
    for name, service in SERVICES.items():
        for variable, value in (service.get("environment") or {}).items():
            secret = re.search("PASSWORD|KEY|SECRET", variable)
            assert not secret or str(value).startswith("/run/secrets/"), f"{name}: {variable}"
    assert all("file" in each for each in COMPOSE["secrets"].values())


def test_ports_are_published_on_this_machine_only_unless_the_operator_says_otherwise() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert set(published) == {"proxy", "grafana"}
    for [port] in published.values():
        assert re.match(r"(\$\{COTUNE_ADDRESS:-127\.0\.0\.1\}|127\.0\.0\.1):", port)


def test_images_are_pinned_and_volumes_named() -> None:
    for name, service in SERVICES.items():
        tag = service["image"].rpartition(":")[2]
        assert re.search(r"\d+\.\d+\.\d+|17\.\d+", tag) or "COTUNE_VERSION" in service["image"], name
        for volume in service.get("volumes", []):
            source = re.split(r":(?=/)", volume)[0]
            named = re.sub(r"^\$\{\w+:-(.*)\}$", r"\1", source)
            assert named.startswith("./") or named in COMPOSE["volumes"], f"{name}: {volume}"


def test_every_variable_is_in_the_example() -> None:
    example = (ROOT / ".env.example").read_text()
    used = set(re.findall(r"\$\{(\w+)", (ROOT / "docker-compose.yml").read_text()))
    for_tests = {"COTUNE_LEASE_SECONDS", "COTUNE_SWEEP_SECONDS", "COTUNE_RESEND_AFTER_SECONDS"}
    assert used - set(re.findall(r"^#?(\w+)=", example, re.MULTILINE)) == for_tests


def test_the_database_and_the_queue_are_reached_by_the_cloud_only() -> None:
    assert COMPOSE["networks"]["cloud"]["internal"] is True
    assert {name for name, each in SERVICES.items() if "cloud" in each["networks"]} == {
        "database", "broker", "migrate", "api", "worker", "worker-gpu", "controller",
    }  # fmt: skip


def test_the_controller_reaches_webhooks() -> None:
    assert not (COMPOSE["networks"]["outside"] or {}).get("internal")
    assert "outside" in SERVICES["controller"]["networks"]


def test_the_proxy_streams_and_keeps_the_metrics_inside() -> None:
    text = (ROOT / "deployment" / "proxy" / "nginx.conf").read_text()
    for line in ("proxy_request_buffering off;", "proxy_buffering off;", "client_max_body_size 0;"):
        assert line in text
    assert "location = /metrics { return 404; }" in text
