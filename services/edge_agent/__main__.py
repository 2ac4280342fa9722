"""`cotune-agent`: enrol a device, run the agent, look at it.

The life of a process: read the command line, check everything the owner configured, take the lock, work until a signal
says stop. Each way to end has a named exit code (`exit_codes`).
"""

import json
import os
import random
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal

import structlog
import typer

import tracing
from edge_agent import durable, identity, lock, logging, loop, settings
from edge_agent.backoff import Backoff, Retrier
from edge_agent.cache import ArtifactCache
from edge_agent.client import CloudClient
from edge_agent.cycle import Agent, Outcome, Trainer
from edge_agent.errors import AgentError, CloudUnavailable, ConfigurationError, NotAuthorised, Stopped
from edge_agent.exit_codes import ExitCode
from edge_agent.ledger import Ledger
from edge_agent.local_state import LocalStates
from edge_agent.outbox import Outbox
from edge_agent.rotation import CredentialRotation
from edge_agent.settings import Settings
from protocol.devices import DeviceProfile

STOP_LIMIT_SECONDS = 8.0
"""After a signal, a step that does not end by itself is given so long. Ending hard then is safe: what matters is on
disk, and a training that was cut is repeated with the same result."""

app = typer.Typer(
    name="cotune-agent",
    help="Tunes this device's small language model together with the cloud. No training text leaves the device.",
    epilog="Exit codes: 0 done or stopped, 1 failure, 2 no connection or not authorised, 3 no work in time,"
    " 4 bad configuration or data, 5 already running, 6 already enrolled.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
log = structlog.get_logger(__name__)

HomeOption = Annotated[Path, typer.Option("--home", help="Folder of this device's identity, state and cache.")]
LogFileOption = Annotated[Path | None, typer.Option("--log-file", help="Write logs there, not to standard error.")]
FormatOption = Annotated[Literal["text", "json"], typer.Option("--format", help="How to print.")]


def main() -> None:
    """Entry point: run the command line, and turn every way to fail into its exit code and a clear message."""
    try:
        result = app(standalone_mode=False)
    except AgentError as error:
        _explain(error)
        sys.exit(error.exit_code)
    except Exception as error:
        # typer's own errors (a wrong option) can print themselves; its exit code for them is 2, which means something
        # else here. Anything else is a fault of ours and keeps its traceback.
        show = getattr(error, "show", None)
        if show is None:
            raise
        show()
        sys.exit(ExitCode.BAD_CONFIGURATION)
    sys.exit(result if isinstance(result, int) else ExitCode.OK)


@app.command()
def enroll(
    *,
    home: HomeOption,
    server: Annotated[str, typer.Option(envvar="COTUNE_SERVER", help="Address of the cloud.")],
    token: Annotated[str, typer.Option(envvar="COTUNE_TOKEN", help="One-time token from the operator.")],
    name: Annotated[str, typer.Option(help="How operators see this device.")],
    model: Annotated[str, typer.Option(help="Model folder, or Hugging Face hub name.")],
    data: Annotated[str, typer.Option(help="Private training rows: .jsonl, .csv, .parquet or a `datasets` folder.")],
    test: Annotated[str | None, typer.Option(help="Rows to measure on, in the same formats.")] = None,
    domain: Annotated[str | None, typer.Option(help="A label for the data, shown to operators.")] = None,
    ca_file: Annotated[str | None, typer.Option(help="PEM: the authority of the server's certificate.")] = None,
    client_certificate: Annotated[str | None, typer.Option(help="PEM, if the server asks for one.")] = None,
    client_key: Annotated[str | None, typer.Option(help="PEM: the key of that certificate.")] = None,
) -> None:
    """Give this device an identity. Once; the id never changes."""
    _make_home(home)
    with lock.hold(home):
        enrolled = identity.enrol(
            home, server=server, token=token, name=name, model=model, data=data, test=test, domain=domain, now=_now,
            ca_file=ca_file, client_certificate=client_certificate, client_key=client_key,
        )  # fmt: skip
    config = enrolled.config
    if enrolled.waits_for_approval:
        print(f"it waits until an operator approves it: cotune device approve {config.device.id}")  # noqa: T201
    print(f"enrolled as {config.device.name} ({config.device.id}); start with: cotune-agent start --home {home}")  # noqa: T201


@app.command()
def start(home: HomeOption, log_file: LogFileOption = None) -> int:
    """Run the agent until a signal stops it."""
    with _running(home, log_file) as (agent, profile):
        try:
            loop.run(agent, profile)
        except Stopped:
            log.info("stopped")
    return ExitCode.OK


@app.command("run-once")
def run_once(
    home: HomeOption,
    log_file: LogFileOption = None,
    timeout: Annotated[float, typer.Option(min=0, help="Seconds to wait for work.")] = 60.0,
) -> int:
    """Do one assignment, and end."""
    with _running(home, log_file) as (agent, profile):
        outcome = loop.run_until_work(agent, timeout, profile)
    log.info("run_once_done", outcome=outcome.value)
    codes = {Outcome.SUBMITTED: ExitCode.OK, Outcome.IDLE: ExitCode.TIMED_OUT}
    return codes.get(outcome, ExitCode.FAILURE)


@app.command("rotate-credential")
def rotate_credential(home: HomeOption) -> None:
    """Replace this device's credential now. A running agent does it by itself, every `rotate_credential_days`."""
    current = settings.load(home, os.environ)
    logging.configure(current.config.log.format, current.config.log.level)
    with lock.hold(home), connect(current, threading.Event()) as client:
        _rotation(current, client).rotate()
    print("the credential is replaced; the one before is void")  # noqa: T201


@app.command()
def status(home: HomeOption, output: FormatOption = "text") -> None:
    """Show what this device is and has done, from its own files; asks nobody."""
    current = settings.load(home, os.environ)
    facts = _facts(current)
    if output == "json":
        print(json.dumps(facts, indent=1))  # noqa: T201
        return
    for key, value in facts.items():
        print(f"{key}: {value if not isinstance(value, (dict, list)) else json.dumps(value)}")  # noqa: T201


def _facts(current: Settings) -> dict[str, Any]:
    home, config = current.home, current.config
    process = lock.holder(home)
    return {
        "device_id": config.device.id,
        "name": config.device.name,
        "server": config.server.url,
        "model": config.model.path,
        "data": str(config.data.train),
        "running": process is not None,
        "process": process,
        "waiting_updates": len(durable.finished(home / "outbox")),
        "runs": [
            {
                "run_id": state.record.run_id,
                "run_name": state.record.run_name,
                "round": state.record.round_number,
                "slm_adapter": str(state.slm_adapter),
            }
            for state in LocalStates(home / "runs").newest()
        ],
        "bytes_sent": Ledger(home / "ledger.jsonl", _now).totals(),
    }


@contextmanager
def _running(home: Path, log_file: Path | None) -> Iterator[tuple[Agent, DeviceProfile]]:
    """Everything that `start` and `run-once` share: check, lock, logs, signals, and the agent's parts."""
    current = settings.load(home, os.environ)
    problems: list[str] = []
    profile = identity.check_inputs(current.config, problems)
    if problems or profile is None:
        raise ConfigurationError(problems)
    logging.configure(current.config.log.format, current.config.log.level, log_file)
    try:
        tracing.start("cotune-agent", os.environ)
    except tracing.TracingUnavailable as error:
        raise ConfigurationError([str(error)]) from None
    with lock.hold(home), structlog.contextvars.bound_contextvars(device_id=current.device_id):
        stop = threading.Event()
        _stop_on_signals(stop)
        log.info("started", server=current.config.server.url, num_examples=profile.num_examples)
        with connect(current, stop) as client:
            yield build_agent(current, client, stop), profile
    tracing.flush()


def connect(current: Settings, stop: threading.Event) -> CloudClient:
    """Return this device's client of the cloud."""
    ledger = Ledger(current.home / "ledger.jsonl", _now)
    server = current.config.server
    return CloudClient(
        server.url,
        current.credential,
        ledger,
        stop,
        now=_now,
        signing_key=current.signing_key,
        tls=current.tls,
        follow_links=server.follow_links,
    )


def _rotation(current: Settings, client: CloudClient) -> CredentialRotation:
    return CredentialRotation(current.home, client, current.config.server.rotate_credential_days, _now)


def build_agent(current: Settings, client: CloudClient, stop: threading.Event) -> Agent:
    """Put the agent together. torch is not imported before the first assignment."""
    trainers: list[Trainer] = []
    states = LocalStates(current.home / "runs")

    def new_backoff() -> Backoff:
        return Backoff(random.random)

    def trainer() -> Trainer:
        if not trainers:
            from edge_agent.training import LocalTrainer

            trainers.append(LocalTrainer(current.config, states))
        return trainers[0]

    retrier = Retrier(stop.wait, new_backoff)
    return Agent(
        client=client,
        retrier=retrier,
        new_backoff=new_backoff,
        stop=stop,
        cache=ArtifactCache(current.home / "cache", retrier.call),
        outbox=Outbox(current.home / "outbox"),
        states=states,
        trainer=trainer,
        rotation=_rotation(current, client),
    )


def _stop_on_signals(stop: threading.Event) -> None:
    """SIGTERM and SIGINT set the stop event; what does not end by itself is ended by a timer."""

    def handle(number: int, frame: FrameType | None) -> None:
        if not stop.is_set():
            stop.set()
            timer = threading.Timer(STOP_LIMIT_SECONDS, os._exit, args=(ExitCode.OK,))
            timer.daemon = True
            timer.start()

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)


def _make_home(home: Path) -> None:
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        probe = home / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigurationError([f"--home {home}: expected a folder that can be written: {error}"]) from None


def _explain(error: AgentError) -> None:
    if isinstance(error, ConfigurationError):
        lines = error.problems
    elif isinstance(error, NotAuthorised):
        lines = [f"the server does not accept this device: {error}", "ask its operator; enrol again under a new --home"]
    elif isinstance(error, CloudUnavailable):
        plain = "WRONG_VERSION_NUMBER" in str(error)
        advice = "it speaks http, not https" if plain else "check the address and the network, then try again"
        lines = [str(error), advice]
    else:
        lines = [str(error)]
    for line in lines:
        print(f"cotune-agent: {line}", file=sys.stderr)  # noqa: T201


def _now() -> datetime:
    return datetime.now(UTC)


if __name__ == "__main__":
    main()
