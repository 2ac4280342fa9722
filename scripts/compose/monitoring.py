"""The `monitoring` profile: Prometheus scrapes the API and takes the alerts, Grafana has the dashboard."""

import base64
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scripts.compose.engine import ROOT, Engine, Failed, image_of

SECONDS = 120
DASHBOARD = "cotune"


def start(engine: Engine) -> Iterator[str]:
    """Start what there are images for; yield what was tried and what was not."""
    for service in ("prometheus", "grafana"):
        image = image_of(service)
        if not engine.has_image(image):
            yield f"NOT TRIED: {service}, as its image {image} can neither be pulled nor be built here"
            continue
        engine.up([[service]])
        yield f"{service} is healthy"


def check(engine: Engine, secrets: Path) -> Iterator[str]:
    """Check what runs of it; yield what was found."""
    if prometheus := engine.container("prometheus"):
        engine.call("exec", prometheus, "promtool", "check", "config", "/etc/prometheus/prometheus.yml")
        up = _wait_for_sample(engine, prometheus, 'up{job="cotune-api"} == 1')
        runs = _wait_for_sample(engine, prometheus, 'max(cotune_runs{status="completed"}) > 0')
        groups = _ask(engine, "http://prometheus:9090/api/v1/rules")["data"]["groups"]
        rules = [rule for group in groups for rule in group["rules"]]
        wrong = [rule["name"] for rule in rules if rule["health"] != "ok"]
        if not rules or wrong:
            raise Failed(f"expected Prometheus to evaluate its alerts, got {len(rules)} with these in error: {wrong}")
        yield f"Prometheus: configuration valid, {len(rules)} alerts evaluated, {up}, {runs}"
    if engine.container("grafana"):
        password = (secrets / "grafana.password").read_text().strip()
        found = _ask(engine, "http://grafana:3000/api/search?type=dash-db", f"admin:{password}")
        if [each["title"] for each in found] != [_dashboard()["title"]]:
            raise Failed(f"expected Grafana to have the dashboard from the file, got {found}")
        yield f"Grafana: dashboard {found[0]['title']!r} provisioned"


def _dashboard() -> dict[str, Any]:
    path = ROOT / "deployment" / "monitoring" / "grafana" / "dashboards" / f"{DASHBOARD}.json"
    return dict(json.loads(path.read_text()))


def _wait_for_sample(engine: Engine, prometheus: str, expression: str) -> str:
    """Ask Prometheus until the expression has a value; return it as promtool writes it, without its time."""
    deadline = time.monotonic() + SECONDS
    while True:
        query = ("promtool", "query", "instant", "http://127.0.0.1:9090", expression)
        if answer := engine.call("exec", prometheus, *query).strip():
            return answer.partition(" @")[0]
        if time.monotonic() > deadline:
            raise Failed(f"expected `{expression}` in Prometheus within {SECONDS} s, got nothing")
        time.sleep(2)


def _ask(engine: Engine, url: str, login: str = "") -> Any:
    """Ask from inside the deployment, as nothing of it is published."""
    authorization = f"Basic {base64.b64encode(login.encode()).decode()}" if login else ""
    program = (
        "import sys, urllib.request as u; "
        "print(u.urlopen(u.Request(sys.argv[1], headers={'Authorization': sys.argv[2]}), timeout=10).read().decode())"
    )
    return json.loads(engine.call("exec", str(engine.container("api")), "python", "-c", program, url, authorization))
