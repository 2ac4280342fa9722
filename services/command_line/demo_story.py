"""The demo from beginning to end: base models, processes, enrolment, two runs, what was measured."""

import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from command_line import demo_settings, folders
from command_line.api_client import ApiClient
from command_line.demo_data import DemoData, write_mix
from command_line.demo_devices import DemoDevice, device_name, enrol_and_start
from command_line.demo_measurement import Measurement
from command_line.demo_models import DemoModels, prepare_models
from command_line.embedded import HOST, Patience, cloud_environment, cloud_specs, wait_until_ready, without_our_settings
from command_line.errors import RunFailed, TimedOut
from command_line.interruption import Interruption
from command_line.live_view import View
from command_line.ports import free_port
from command_line.results import DemoResults
from command_line.supervisor import Supervisor
from command_line.watching import Look, RunWatch
from protocol.runs import Run, RunCreate
from protocol.statuses import RunStatus

ROUNDS = 3
THREADS = 1
"""Of torch, in each process. Models this small gain nothing from a second thread, and where processes outnumber cores
the threads of one wait for each other: with two threads on two busy cores, distilling took ten times as long."""
POLL_SECONDS = 0.4

FINISHED = frozenset({RunStatus.COMPLETED, RunStatus.FAILED, RunStatus.STOPPED})


@dataclass(frozen=True)
class DemoOptions:
    """What to play, and where."""

    data: DemoData
    cache: Path
    folder: Path
    rounds: int
    timeout_seconds: float


@dataclass
class _Stopwatch:
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[stage] = time.monotonic() - started


def play(options: DemoOptions, view: View, state: Interruption) -> DemoResults:
    """Play the whole demo and return what it measured. Every process has ended when this returns or raises.

    Raises:
        CommandError: a process does not stay alive, a run failed, or the time is over.
        Interrupted: somebody asked to stop.
    """
    started = time.monotonic()
    watch = _Stopwatch()
    notices: list[str] = []

    def notify(line: str) -> None:
        notices.append(line)
        view.say(line)

    logs = options.folder / "logs"
    logs.mkdir()
    view.facts({"Logs": str(logs)})
    supervisor = Supervisor(logs, notify=notify, environment=_environment(), hurry=lambda: state.impatient)
    with supervisor:
        with watch.measure("base_models"):
            view.step("Base models: built once, then cached")
            models = prepare_models(options.data, options.cache, view)
        stage = _Stage(
            options, models, view, supervisor, watch, started + options.timeout_seconds, Patience(supervisor)
        )
        results = stage.play()
        view.step("Ending every process")
    restarts = sum(line.endswith("starting it again") for line in notices)
    return results.model_copy(update={"seconds": time.monotonic() - started, "restarts": restarts})


@dataclass
class _Stage:
    """What the parts of the story share once the base models are there."""

    options: DemoOptions
    models: DemoModels
    view: View
    supervisor: Supervisor
    watch: _Stopwatch
    deadline: float
    patience: Patience

    def play(self) -> DemoResults:
        port = free_port(HOST)
        address = f"http://{HOST}:{port}"
        home = self.options.folder / "cloud"
        home.mkdir()
        key_file = folders.make_operator_key(home)
        environment = cloud_environment(home, torch_threads=THREADS)
        environment |= {"COTUNE_SWEEP_SECONDS": "1"}
        with ApiClient(address, key_file.read_text(encoding="ascii").strip()) as client:
            with self.watch.measure("start"):
                self.view.step("Starting the cloud: API, worker, controller")
                self.view.facts(
                    {"API": f"{address} (documentation: {address}/docs)", "Logs": str(self.supervisor.logs)}
                )
                for spec in cloud_specs(HOST, port, environment):
                    self.supervisor.start(spec)
                wait_until_ready(client, self.supervisor)
            mix = self.options.folder / "mix.jsonl"
            write_mix(self.options.data, mix, rows_a_domain=demo_settings.TEST_ROWS)
            with self.watch.measure("enrol"):
                self.view.step("Enrolling the devices")
                self._enrol(client)
            runs = self._create_runs(client, mix)
            with self.watch.measure("runs"):
                self.view.step("Standalone tuning for comparison, then co-tuning")
                self._follow(client, runs)
            measured = Measurement(client, self.patience, self.options.data, self.models)
            return measured.results(runs[0], runs[1], self.watch.seconds, self.supervisor)

    def _enrol(self, client: ApiClient) -> None:
        data = self.options.data
        devices = [
            DemoDevice(
                name=device_name(index),
                domain=domain,
                model=self.models.slm(index).folder,
                train=data.split(domain, "train"),
                test=data.split(domain, "test"),
                home=self.options.folder / "devices" / device_name(index),
            )
            for index, domain in enumerate(data.domains)
        ]
        enrol_and_start(devices, client, self.supervisor, {"COTUNE_TORCH_THREADS": str(THREADS)})

    def _create_runs(self, client: ApiClient, mix: Path) -> list[str]:
        """Both runs at once: while the devices tune alone, the worker prepares the proxy."""
        data, devices = self.options.data, len(self.options.data.domains)
        configs = [
            demo_settings.standalone_run(rounds=self.options.rounds, devices=devices, given=data.given),
            demo_settings.co_plms_run(
                rounds=self.options.rounds,
                devices=devices,
                given=data.given,
                llm=self.models.llm.folder,
                proxy=self.models.proxy.folder,
                public_data=data.public,
                evaluation_data=mix,
            ),
        ]
        return [self._create_run(client, config).run_id for config in configs]

    def _create_run(self, client: ApiClient, config: RunCreate) -> Run:
        key = secrets.token_hex(16)
        body = config.model_dump(mode="json")
        return self.patience.ask(lambda: client.create_run(body, idempotency_key=key))

    def _follow(self, client: ApiClient, runs: Sequence[str]) -> None:
        """Watch the runs until both have completed.

        Raises:
            RunFailed: one of them ended otherwise.
            TimedOut: the time is over.
        """
        followers = [RunWatch(client, run_id) for run_id in runs]
        looks: list[Look] = []

        def finished() -> bool:
            nonlocal looks
            looks = [self.patience.ask(each.look) for each in followers]
            self.view.show(looks)
            if time.monotonic() > self.deadline:
                raise TimedOut(f"the demo did not finish within {self.options.timeout_seconds:.0f} s")
            for look in looks:
                if look.run.status in (RunStatus.FAILED, RunStatus.STOPPED):
                    raise RunFailed(f"run {look.run.name} {look.run.status}: {look.run.status_reason}")
            return all(look.run.status in FINISHED for look in looks)

        self.supervisor.keep_alive(finished, every_seconds=POLL_SECONDS)


def _environment() -> dict[str, str]:
    """What the demo's processes inherit: none of the user's own Cotune settings, and no network but 127.0.0.1."""
    return without_our_settings() | {"HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
