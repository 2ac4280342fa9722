"""What docker-compose.yml and the files beside it promise, read from them. That they work: `make compose-test`."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from scripts.compose.engine import OPTIONAL, image_of
from tests.cloud_api.running_api import running_api, settings_in

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
    files = (ROOT / "docker-compose.yml", ROOT / "deployment" / "s3.yml")
    used = set(re.findall(r"\$\{(\w+)", "".join(each.read_text() for each in files)))
    for_tests = {"COTUNE_LEASE_SECONDS", "COTUNE_SWEEP_SECONDS", "COTUNE_RESEND_AFTER_SECONDS"}
    assert used - set(re.findall(r"^#?(\w+)=", example, re.MULTILINE)) == for_tests


def test_agents_are_shown_no_key() -> None:
    holders = {
        name for name, each in SERVICES.items() if any("certificates}:" in one for one in each.get("volumes", []))
    }
    assert holders == {"certificates", "proxy"}
    for name, each in SERVICES.items():
        if name == "agent" or name in {"demo-phone", "demo-tablet", "demo-laptop"}:
            assert "authority:/authority:ro" in each["volumes"]
            assert each["environment"]["SSL_CERT_FILE"] == "/authority/ca.pem"
            assert each["environment"]["COTUNE_SERVER"] == "https://proxy:8443"


def test_the_object_store_is_for_all_who_have_blobs_and_reached_by_them() -> None:
    override = yaml.safe_load((ROOT / "deployment" / "s3.yml").read_text())
    with_blobs = {name for name, each in SERVICES.items() if any("blobs:/" in one for one in each.get("volumes", []))}
    assert set(override["services"]) == with_blobs
    for name, changed in override["services"].items():
        assert changed["environment"]["COTUNE_BLOBS"].startswith("${COTUNE_BLOBS:?")
        assert changed["secrets"] == ["s3_credentials"]
        assert "outside" in SERVICES[name]["networks"] + changed.get("networks", [])
        home = (SERVICES[name]["environment"] | changed["environment"])["COTUNE_HOME"]
        on_disk = any(one.split(":")[1] == home for one in SERVICES[name]["volumes"])
        assert on_disk or name == "controller", "a file that waits for the store must not lie in memory"


def test_every_service_of_the_monitoring_can_be_tried_by_itself() -> None:
    assert {name for name, each in SERVICES.items() if each.get("profiles") == ["monitoring"]} == OPTIONAL
    assert {name: image_of(name) for name in OPTIONAL} == {name: SERVICES[name]["image"] for name in OPTIONAL}


def test_the_database_and_the_queue_are_reached_by_the_cloud_only() -> None:
    assert COMPOSE["networks"]["cloud"]["internal"] is True
    assert {name for name, each in SERVICES.items() if "cloud" in each["networks"]} == {
        "database", "broker", "migrate", "api", "worker", "worker-gpu", "controller",
    }  # fmt: skip


def expressions() -> list[str]:
    folder = ROOT / "deployment" / "monitoring"
    dashboard = json.loads((folder / "grafana" / "dashboards" / "cotune.json").read_text())
    alerts = yaml.safe_load((folder / "alerts.yml").read_text())
    shown = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return shown + [rule["expr"] for group in alerts["groups"] for rule in group["rules"]]


Samples = Mapping[str, Mapping[str, set[str]]]
"""Metric -> label -> the values that it has."""


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory, migrated_sqlite: Path) -> Samples:
    """What the API's /metrics has once a device has asked for work, and `up`, which Prometheus itself adds."""
    home = tmp_path_factory.mktemp("home")
    shutil.copy(migrated_sqlite, home / "cotune.sqlite3")
    with running_api(settings_in(home)) as api:
        device = api.enrol()
        api.running_run(device)
        assert device.poll() is not None
        text = api.client(None).get("/metrics").text
    [scraped] = yaml.safe_load((ROOT / "deployment" / "monitoring" / "prometheus.yml").read_text())["scrape_configs"]
    found: dict[str, dict[str, set[str]]] = {"up": {"job": {scraped["job_name"]}, "instance": set()}}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = found.setdefault(sample.name, {})
            for label, value in sample.labels.items():
                labels.setdefault(label, set()).add(value)
    return found


@pytest.mark.parametrize("expression", expressions())
def test_dashboards_and_alerts_ask_for_what_there_is(expression: str, samples: Samples) -> None:
    names = set(re.findall(r"\b(cotune_\w+|up)\b", expression))
    assert names
    assert names <= set(samples)
    labels = set().union(*(samples[name] for name in names))
    assert {each.strip() for group in re.findall(r"by \(([^)]*)\)", expression) for each in group.split(",")} <= labels
    for name, matchers in re.findall(r"(\w+)\{([^}]*)\}", expression):
        for label, value in re.findall(r'(\w+)=~?"([^"]*)"', matchers):
            # A status of HTTP is there only after an answer with it, the other statuses always.
            classes = re.search(r"\.", value)
            assert set(value.split("|")) <= samples[name][label] or (classes and label in samples[name]), label


def test_what_every_container_reads_from_the_database_is_not_added_up() -> None:
    own = {"cotune_http_requests_total", "cotune_http_request_seconds_bucket", "cotune_waiting_devices"}
    for expression in expressions():
        names = set(re.findall(r"\bcotune_\w+", expression))
        compared = bool(re.search(r"[<>=] *0$", expression))  # whether there is any: adding does not change it
        assert names <= own or compared or "sum" not in expression, expression


def test_the_controller_reaches_webhooks() -> None:
    assert not (COMPOSE["networks"]["outside"] or {}).get("internal")
    assert "outside" in SERVICES["controller"]["networks"]


def test_the_proxy_streams_and_keeps_the_metrics_inside() -> None:
    text = (ROOT / "deployment" / "proxy" / "nginx.conf").read_text()
    for line in ("proxy_request_buffering off;", "proxy_buffering off;", "client_max_body_size 0;"):
        assert line in text
    assert "location = /metrics { return 404; }" in text
