"""What the test needs of a container engine, on Docker and on Podman alike.

Podman before 4.6 does not wait for a dependency's health, and without systemd nobody runs the health checks: so `up`
starts the stages one after another and asks for the health of each itself.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
STAND_INS = str(ROOT / "scripts" / "compose" / "stand_in_images.sh")
STAGES = (
    ("database", "broker", "certificates"),
    ("migrate",),
    ("api",),
    ("proxy", "worker", "controller"),
    ("demo-seed",),
    ("demo-phone", "demo-tablet", "demo-laptop"),
)
ONE_SHOT = frozenset({"certificates", "migrate", "demo-seed"})
UNCHECKED = frozenset({"demo-phone", "demo-tablet", "demo-laptop"})
IMAGES = {"cotune/api": "cloud_api", "cotune/agent": "edge_agent", "cotune/worker": "worker"}
OPTIONAL = frozenset({"prometheus", "grafana"})
"""Services whose images need not be had: the rest is tested without them."""
BASES = re.compile(r"^\s*image: ((?:postgres|redis|nginx):\S+)$|^ARG PYTHON_IMAGE=(\S+)$", re.MULTILINE)


class Unusable(Exception):
    """Nothing can be tested here; the message says why."""


class Failed(Exception):
    """The deployment does not do what it should."""


@dataclass(frozen=True)
class Engine:
    """A container engine and a deployment of ours on it."""

    program: str
    compose: tuple[str, ...]
    project: str
    environment: dict[str, str]

    @property
    def podman(self) -> bool:
        """Whether it is Podman."""
        return self.program == "podman"

    def call(self, *arguments: str, check: bool = True, seconds: float = 900) -> str:
        """Run the engine's own program; return what it wrote."""
        return self.run([self.program, *arguments], check, seconds)

    def compose_call(self, *arguments: str, check: bool = True, seconds: float = 900) -> str:
        """Run the compose program."""
        return self.run([*self.compose, *arguments], check, seconds)

    def up(self, stages: Sequence[Sequence[str]] = STAGES, *, seconds: float = 600) -> None:
        """Start services stage by stage, each healthy (or, one-shot, done) before the next."""
        for stage in stages:
            self.compose_call("up", "-d", "--no-deps", "--no-build", *stage)
            for service in stage:
                if service not in UNCHECKED:
                    self.wait(service, seconds)

    def wait(self, service: str, seconds: float) -> None:
        """Wait until a service is healthy, or a one-shot service has done its work."""
        deadline = time.monotonic() + seconds
        while not (self.done(service) if service in ONE_SHOT else self.healthy(service)):
            if time.monotonic() > deadline:
                raise Failed(f"{service} is not ready after {seconds:.0f} s; its log ends with:\n{self.log(service)}")
            time.sleep(0.5)

    def healthy(self, service: str) -> bool:
        """Whether a service runs and its health check says so, now."""
        container = self.container(service)
        if container is None or not self.state(container)["Running"]:
            return False
        if self.podman:
            command = [self.program, "healthcheck", "run", container]
            return subprocess.run(command, env=self.environment, capture_output=True, check=False).returncode == 0
        return str(self.state(container).get("Health", {}).get("Status")) == "healthy"

    def done(self, service: str) -> bool:
        """Whether a one-shot service ended well."""
        container = self.container(service)
        state = self.state(container) if container else {"Status": "missing"}
        return state["Status"] in {"exited", "stopped"} and state["ExitCode"] == 0

    def has_image(self, name: str) -> bool:
        """Whether an image is here."""
        return _works(self.program, "image", "inspect", name, engine=self)

    def kill(self, service: str) -> None:
        """Kill a container's first process as a crash would: with the engine's own `kill` it would stay down."""
        container = self.container(service)
        assert container is not None, f"{service} has no container"
        try:
            os.kill(int(str(self.state(container)["Pid"])), signal.SIGKILL)
        except PermissionError:  # an engine of another user: everything but its first process, which then ends
            self.call("exec", container, "sh", "-c", "kill -9 -1", check=False)

    def container(self, service: str) -> str | None:
        """The id of a service's container."""
        labels = (f"com.docker.compose.project={self.project}", f"com.docker.compose.service={service}")
        found = self.call("ps", "-aq", *(each for label in labels for each in ("--filter", f"label={label}"))).split()
        return found[0] if found else None

    def state(self, container: str) -> dict[str, Any]:
        """The container's state as the engine tells it."""
        return dict(json.loads(self.call("inspect", "--format", "{{json .State}}", container)))

    def log(self, service: str, lines: int = 15) -> str:
        """The end of a service's log."""
        container = self.container(service)
        return self.call("logs", "--tail", str(lines), container, check=False) if container else "no container"

    def down(self) -> None:
        """Remove the deployment: containers, networks and volumes."""
        self.compose_call("down", "--volumes", check=False)
        for kind in ("network", "volume"):  # podman-compose leaves some behind
            names = [each for each in self.call(kind, "ls", "-q", check=False).split() if each.startswith(self.project)]
            if names:
                self.call(kind, "rm", *names, check=False)

    def build(self, folder: Path) -> None:
        """Build our three images; `folder` takes a copy of this machine's configuration of pip."""
        options = build_options(folder, podman=self.podman)
        for image, service in IMAGES.items():
            name = f"{image}:{self.environment['COTUNE_VERSION']}"
            file = str(ROOT / "services" / service / "Dockerfile")
            self.run([self.program, "build", *options, "--tag", name, "--file", file, str(ROOT)])

    def image_bytes(self, name: str) -> int:
        """The size of an image as it is unpacked."""
        return int(self.call("image", "inspect", "--format", "{{.Size}}", name))

    def run(self, command: Sequence[str], check: bool = True, seconds: float = 1200) -> str:
        """Run a command in the project's folder; return what it wrote."""
        done = subprocess.run(
            command, env=self.environment, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=seconds, check=False,
        )  # fmt: skip
        if check and done.returncode != 0:
            raise Failed(f"`{' '.join(command)}` ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
        return done.stdout if check else done.stdout + done.stderr


def find_engine(project: str, settings: Path, folder: Path, environment: dict[str, str]) -> Engine:
    """Return the first engine that works.

    Args:
        settings: the deployment's `.env` file.
        folder: for a configuration of Podman, where the machine's own does not fit.

    Raises:
        Unusable: there is none.
    """
    options = ("-p", project, "--env-file", str(settings), "--profile", "demo", "--profile", "monitoring")
    if _works("docker", "info") and _works("docker", "compose", "version"):
        return Engine("docker", ("docker", "compose", *options), project, environment)
    program = shutil.which("podman-compose") or str(Path(sys.executable).with_name("podman-compose"))
    if _works("podman", "version") and _works(program, "--version"):
        if "CONTAINERS_CONF" not in environment and not Path("/run/systemd/private").exists():
            environment = environment | {"CONTAINERS_CONF": str(_podman_without_systemd(folder))}
        return Engine("podman", (program, *options), project, environment)
    raise Unusable("neither Docker with its compose plugin nor Podman with podman-compose works here")


def image_of(service: str) -> str:
    """The image of a service of docker-compose.yml that is not ours."""
    text = (ROOT / "docker-compose.yml").read_text()
    found = re.search(rf"^  {service}:\n(?:    .*\n)*?    image: (\S+)$", text, re.MULTILINE)
    assert found is not None, service
    return found[1]


def prepare_bases(engine: Engine) -> None:
    """Have every base image: there already, pulled, or built here from Debian packages.

    Raises:
        Unusable: one that is not optional can be had in none of these ways.
    """
    _prepare_optional(engine)
    files = [ROOT / "docker-compose.yml", *(ROOT / "services" / each / "Dockerfile" for each in IMAGES.values())]
    wanted = sorted({a or b for file in files for a, b in BASES.findall(file.read_text())})
    missing = [each for each in wanted if not _works(engine.program, "image", "inspect", each, engine=engine)]
    still = [each for each in missing if not _works(engine.program, "pull", "--quiet", each, engine=engine)]
    if not still:
        return
    if not _can_build(engine):
        raise Unusable(f"{', '.join(still)} can neither be pulled nor be built here (root, debootstrap, apt, podman)")
    engine.run(["sh", STAND_INS, *still])


def _prepare_optional(engine: Engine) -> None:
    for image in map(image_of, sorted(OPTIONAL)):
        here = engine.has_image(image) or _works(engine.program, "pull", "--quiet", image, engine=engine)
        if not here and _can_build(engine):
            engine.run(["sh", STAND_INS, image], check=False)


def _can_build(engine: Engine) -> bool:
    tools = all(map(shutil.which, ("debootstrap", "apt-get")))
    return engine.podman and os.geteuid() == 0 and tools


def build_options(folder: Path, *, podman: bool) -> list[str]:
    """How a build reaches the package index: as pip does on this machine. Nothing of it stays in an image."""
    configuration = os.environ.get("COTUNE_PIP_CONFIG") or str(_pip_configuration(folder / "pip.conf"))
    options = ["--secret", f"id=pip_config,src={configuration}"]
    if podman:
        options += ["--network", "host"]
        named = map(Path, re.findall(r"(?:file://)?(/[^\s'\"]+)", Path(configuration).read_text()))
        # The pages of an index in a folder called `simple` link to files beside it.
        needed = {each.parent if each.name == "simple" else each for each in named if each.exists()}
        for path in sorted(needed):
            options += ["--volume", f"{path}:{path}:ro"]
    return options


def _pip_configuration(path: Path) -> Path:
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    ).stdout
    found = dict(re.findall(r"^(?:global|install|:env:)\.([a-z-]+)='(.*)'$", listed, re.MULTILINE))
    path.touch(mode=0o600)  # an index's address may hold a password
    path.write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in found.items()))
    return path


def _podman_without_systemd(folder: Path) -> Path:
    """Podman as it works where nobody but us runs: runc, no systemd, limits that this machine allows."""
    import resource

    files, processes = (resource.getrlimit(each)[1] for each in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC))
    most = int(Path("/proc/sys/kernel/pid_max").read_text())  # Podman lowers its own limit to this
    processes = most if processes == resource.RLIM_INFINITY else min(processes, most)
    runtime = "runc" if shutil.which("runc") else "crun"
    path = folder / "containers.conf"
    path.write_text(
        f'[engine]\nruntime = "{runtime}"\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n'
        f'[containers]\ndefault_ulimits = ["nofile={files}:{files}", "nproc={processes}:{processes}"]\n'
    )
    return path


def _works(*command: str, engine: Engine | None = None) -> bool:
    try:
        done = subprocess.run(
            command, env=engine.environment if engine else None, capture_output=True, timeout=120, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
