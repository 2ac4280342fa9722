"""`make compose-test`: the deployment of docker-compose.yml for real, with a demo inside it.

Builds the images and brings everything up on a database of the first release, which the migration job has to upgrade.
Lets three agents co-tune through the TLS proxy, kills the API, the database, the broker and the worker during the
rounds, sees the run complete with each update counted once, asks Prometheus, saves a backup, wipes everything,
restores, and finds the run and its adapters again. Takes everything down at the end, however it ends.

Base models that `make demo` has built on this machine (`$COTUNE_CACHE`) are taken, else they are built anew.

Exit codes: 0 passed, or skipped because nothing here can run containers (it says so); 1 failed.
"""

import json
import os
import secrets
import shlex
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from scripts.compose import monitoring, old_release
from scripts.compose.engine import IMAGES, STAGES, UNCHECKED, Engine, Failed, Unusable, find_engine, prepare_bases

LIMIT_SECONDS = 60 * 60
"""From `up` to the end; building, which may download, is not in it."""
MOST_API_BYTES = 400 * 10**6
ROUNDS = 3
DEVICES = 3
RECOVERY_SECONDS = 600
PROXY_PORT = 8443


@dataclass
class Deployment:
    """A deployment on an engine, as its operator sees it."""

    engine: Engine
    port: int
    key: str
    deadline: float
    trusted: ssl.SSLContext | None = None

    def get(self, path: str) -> Any:
        """Ask the API through the proxy, over TLS that is verified."""
        return json.loads(self.fetch(path))

    def fetch(self, path: str) -> bytes:
        """The body of an answer; asked again while something is away."""
        while True:
            try:
                return self._fetch(path)
            except (OSError, urllib.error.HTTPError) as error:
                if isinstance(error, urllib.error.HTTPError) and error.code < 500:
                    raise Failed(f"{path} is answered with {error.code}: {error.read()[:500]!r}") from None
                self.check_time(f"{path} is not answered: {error}")
            time.sleep(0.5)

    def check_time(self, what: str) -> None:
        """Give up when the time is over."""
        if time.monotonic() > self.deadline:
            raise Failed(f"not done within {LIMIT_SECONDS} s: {what}")

    def _fetch(self, path: str) -> bytes:
        if self.trusted is None:
            proxy = self.engine.container("proxy")
            authority = self.engine.call("exec", str(proxy), "cat", "/certificates/ca.pem")
            self.trusted = ssl.create_default_context(cadata=authority)
        headers = {"Authorization": f"Bearer {self.key}"}
        request = urllib.request.Request(f"https://127.0.0.1:{self.port}{path}", headers=headers)
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=self.trusted)
        )
        with closing(opener.open(request, timeout=20)) as answer:
            return bytes(answer.read())

    def run(self) -> Any:
        """The demo's run; the other one is of the first release."""
        [run] = [each for each in self.get("/v1/runs")["items"] if each["name"] != old_release.RUN_NAME]
        return run

    def rounds(self, run_id: str) -> list[Any]:
        """Its rounds with their devices."""
        return list(self.get(f"/v1/runs/{run_id}/rounds?limit=100")["items"])

    def adapters(self, run_id: str) -> dict[str, str]:
        """The SHA-256 of each published adapter, of the bytes that the API sends."""
        versions = self.get(f"/v1/runs/{run_id}/versions?limit=100")["items"]
        kinds = ("proxy", "llm")
        paths = [f"/v1/runs/{run_id}/versions/{each['number']}/adapters/{kind}" for each in versions for kind in kinds]
        return {path: sha256(self.fetch(path)).hexdigest() for path in paths}


def main() -> int:
    """Test, clean up, and return the exit code."""
    folder = Path(tempfile.mkdtemp(prefix="cotune-compose-"))
    project = f"cotunetest{secrets.token_hex(3)}"
    settings, port = write_settings(folder)
    try:
        engine = find_engine(project, settings, folder, dict(os.environ) | read_settings(settings))
        say(f"engine: {engine.program}")
        prepare_bases(engine)
    except Unusable as reason:
        say(f"SKIPPED: {reason}")
        shutil.rmtree(folder)
        return 0
    try:
        engine.build(folder)
        check_images(engine)
        key = (folder / "secrets" / "operator.key").read_text().strip()
        play(Deployment(engine, port, key, time.monotonic() + LIMIT_SECONDS), folder)
    except (Failed, subprocess.TimeoutExpired) as failure:
        say(f"FAILED: {failure}")
        return 1
    finally:
        engine.down()
        shutil.rmtree(folder, ignore_errors=True)
    say("PASSED")
    return 0


def play(deployment: Deployment, folder: Path) -> None:
    """The whole story, from `up` to the restored backup."""
    engine = deployment.engine
    started = time.monotonic()
    engine.up(STAGES[:1])
    old_release.leave_database(engine)
    say(f"a database of the first release made after {time.monotonic() - started:.0f} s")
    begun = time.monotonic()
    engine.up(STAGES[1:4])
    say(f"ready {time.monotonic() - begun:.0f} s after the start on that database")
    wait_until_all_is_ready(deployment)
    check_upgraded(deployment)
    tell_memory(engine, "at rest")
    for line in monitoring.start(engine):
        say(line)
    take_base_models(engine, folder / "given")
    engine.up(STAGES[4:], seconds=deployment.deadline - time.monotonic())
    say(f"demo seeded and agents started after {time.monotonic() - started:.0f} s")
    run_id = deployment.run()["run_id"]
    check_agents_speak_tls(deployment)
    for service in ("api", "database", "broker"):
        wait_for(deployment, run_id, {"collecting"})
        kill_and_recover(deployment, service)
    wait_for(deployment, run_id, {"aggregating", "co_tuning", "evaluating"})
    kill_and_recover(deployment, "worker")
    wait_for_run(deployment, run_id)
    check_counted_once(deployment, run_id)
    adapters = deployment.adapters(run_id)
    tell_memory(engine, "with the demo")
    for line in monitoring.check(engine, folder / "secrets"):
        say(line)
    say(f"run completed after {time.monotonic() - started:.0f} s; {len(adapters)} adapters")

    save = [sys.executable, "scripts/backup.py"]
    compose = ["--compose", shlex.join(engine.compose)]
    engine.run([*save, "save", str(folder / "backup"), *compose])
    say(engine.run([*save, "check", str(folder / "backup")]).strip())
    engine.down()
    expect(engine.container("database") is None, "nothing left after `down`")
    engine.up(STAGES[:4])
    engine.run([*save, "restore", str(folder / "backup"), *compose])
    engine.up(STAGES[:4])
    deployment.trusted = None  # the certificates were wiped too
    expect(deployment.run()["status"] == "completed", "the restored run completed")
    check_counted_once(deployment, run_id)
    check_upgraded(deployment)
    expect(deployment.adapters(run_id) == adapters, "the restored adapters are those from before, byte for byte")
    say("restored: run, rounds and adapters are those from before")


def wait_until_all_is_ready(deployment: Deployment) -> None:
    """Wait until the API has everything; the queue, which it can do without for a while, it loads last."""
    begun = time.monotonic()
    while set((ready := deployment.get("/ready"))["checks"].values()) != {"ok"}:
        expect(time.monotonic() - begun < RECOVERY_SECONDS, f"everything ready, got {ready}")
        time.sleep(1)


def wait_for(deployment: Deployment, run_id: str, statuses: set[str]) -> None:
    """Wait until the run's round is in one of these."""
    while True:
        rounds = deployment.rounds(run_id)
        if any(each["status"] in statuses for each in rounds):
            return
        run = deployment.get(f"/v1/runs/{run_id}")
        if run["status"] in {"completed", "failed", "stopped"}:
            raise Failed(f"expected a round in {statuses}, the run is {run['status']}: {run['status_reason']}")
        deployment.check_time(f"the run waits: {run['status_reason']}")
        time.sleep(0.3)


def wait_for_run(deployment: Deployment, run_id: str) -> None:
    """Wait until the run has completed."""
    while (run := deployment.get(f"/v1/runs/{run_id}"))["status"] != "completed":
        if run["status"] in {"failed", "stopped"}:
            raise Failed(f"the run is {run['status']}: {run['status_reason']}")
        deployment.check_time(f"the run is {run['status']}, round {run['current_round']}: {run['status_reason']}")
        time.sleep(1)


def kill_and_recover(deployment: Deployment, service: str) -> None:
    """Kill a service's container and wait until it is healthy again, by its restart policy alone."""
    engine = deployment.engine
    former = engine.state(str(engine.container(service)))["Pid"]
    begun = time.monotonic()
    engine.kill(service)
    while engine.state(str(engine.container(service)))["Pid"] in {former, 0}:
        expect(time.monotonic() - begun < RECOVERY_SECONDS, f"{service} restarted within {RECOVERY_SECONDS} s")
        time.sleep(0.2)
    engine.wait(service, RECOVERY_SECONDS)
    say(f"killed {service}: healthy again after {time.monotonic() - begun:.1f} s")


def take_base_models(engine: Engine, folder: Path) -> None:
    """Give the demo the base models that `make demo` has built on this machine, which takes minutes."""
    cache = Path(os.environ.get("COTUNE_CACHE", Path.home() / ".cache" / "cotune"))
    if (cache / "base_models").is_dir():
        shutil.copytree(cache / "base_models", folder / "base_models", ignore_dangling_symlinks=True)
        for each in [folder, *folder.rglob("*")]:
            each.chmod(0o755 if each.is_dir() else 0o644)  # the containers' user is another
        copy = "mkdir -p /demo/cache && cp -r /given/base_models /demo/cache/"
        engine.compose_call("run", "--rm", "--no-deps", "-v", f"{folder}:/given:ro", "demo-seed", "sh", "-c", copy)
        say(f"base models taken from {cache}")


def check_upgraded(deployment: Deployment) -> None:
    """What the first release left is there, at today's revision."""
    runs, devices = (deployment.get(f"/v1/{each}")["items"] for each in ("runs", "devices"))
    revision = old_release.check_upgraded(deployment.engine, runs, devices)
    say(f"the first release's run and device are there, the database is at revision {revision}")


def check_agents_speak_tls(deployment: Deployment) -> None:
    """Every connection of every agent is to the proxy's TLS port; the API's own port is on the same network."""
    seen: dict[str, set[int]] = {service: set() for service in sorted(UNCHECKED)}
    while not all(seen.values()):
        for service in seen:
            container = str(deployment.engine.container(service))
            table = deployment.engine.call("exec", container, "cat", "/proc/net/tcp", check=False)
            seen[service] |= remote_ports(table)
        deployment.check_time(f"agents without a connection: {[each for each in seen if not seen[each]]}")
        time.sleep(0.3)
    expect(all(ports == {PROXY_PORT} for ports in seen.values()), f"agents that speak to the proxy only, got {seen}")
    say(f"each agent speaks TLS to the proxy: {seen}")


def remote_ports(table: str) -> set[int]:
    """The remote ports of the established connections in a table of the kernel's (`/proc/net/tcp`)."""
    rows = [line.split() for line in table.splitlines()[1:]]
    return {int(row[2].partition(":")[2], 16) for row in rows if len(row) > 3 and row[3] == "01"}


def check_counted_once(deployment: Deployment, run_id: str) -> None:
    """Each device counted once in each round, and each version made of as many updates as there are devices."""
    rounds = deployment.rounds(run_id)
    expect(len(rounds) == ROUNDS, f"{ROUNDS} rounds, got {len(rounds)}")
    for each in rounds:
        counted = Counter(device["device_id"] for device in each["devices"] if device["status"] == "counted")
        expect(each["status"] == "published", f"round {each['number']} published, got {each['status']}")
        expect(sorted(counted.values()) == [1] * DEVICES, f"each device counted once, got {counted}")
    versions = deployment.get(f"/v1/runs/{run_id}/versions?limit=100")["items"]
    made_of = {each["number"]: each["num_updates"] for each in versions}
    expect(made_of == {0: 0} | dict.fromkeys(range(1, ROUNDS + 1), DEVICES), f"updates a version, got {made_of}")


def check_images(engine: Engine) -> None:
    """The API's image is small and has no torch."""
    version = engine.environment["COTUNE_VERSION"]
    sizes = {name: engine.image_bytes(f"{name}:{version}") for name in IMAGES}
    say("images: " + ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in sizes.items()))
    expect(sizes["cotune/api"] < MOST_API_BYTES, f"the API's image under 400 MB, got {sizes['cotune/api'] / 1e6:.0f}")
    find = "import importlib.util as u; raise SystemExit(u.find_spec('torch') is not None)"
    engine.call("run", "--rm", "--network", "none", f"cotune/api:{version}", "python", "-c", find)


def tell_memory(engine: Engine, when: str) -> None:
    """Say what each container holds."""
    format_ = ("--no-stream", "--format", "{{.Name}} {{.MemUsage}}")
    for line in engine.call("stats", *format_, check=False).splitlines():
        if engine.project in line and not line.endswith(" 0B / 0B"):  # what has done its work holds nothing
            say(f"memory {when}: {line}")


def write_settings(folder: Path) -> tuple[Path, int]:
    """Write secrets and an `.env` for a deployment that meets nothing else on this machine; return it and the port."""
    subprocess.run(["sh", "scripts/make_secrets.sh", str(folder / "secrets")], check=True, capture_output=True)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    values = {
        "COTUNE_SECRETS": folder / "secrets",
        "COTUNE_PORT": port,
        "COTUNE_VERSION": "test",
        "COTUNE_TORCH_THREADS": 1,
        "COTUNE_DEMO_ROUNDS": ROUNDS,
        # A killed worker is noticed after seconds and not after half a minute.
        "COTUNE_LEASE_SECONDS": 10,
        "COTUNE_SWEEP_SECONDS": 2,
        "COTUNE_RESEND_AFTER_SECONDS": 5,
    }
    path = folder / "env"
    path.write_text("".join(f"{name}={value}\n" for name, value in values.items()))
    return path, port


def read_settings(path: Path) -> dict[str, str]:
    """An `.env` file as an environment."""
    return dict(line.split("=", 1) for line in path.read_text().splitlines())


def expect(true: bool, what: str) -> None:
    """Fail unless it is true."""
    if not true:
        raise Failed(f"expected {what}")


def say(line: str) -> None:
    """Tell a person."""
    print(f"compose-test: {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
