"""`cotune run`: create, see, hold, retry, roll back and stop runs."""

import time
import tomllib
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from command_line.api_client import ApiClient
from command_line.connection import Format, Server, connect
from command_line.errors import BadInput, RunFailed, TimedOut
from command_line.output import OutputFormat, bytes_text, console, print_json, print_table
from command_line.watching import RunWatch, changes
from protocol.runs import Round, RoundDevice, Run, Waiting
from protocol.statuses import RunStatus

app = typer.Typer(no_args_is_help=True, help="Create, see, watch, pause, resume, retry, roll back and stop runs.")

RunId = Annotated[str, typer.Argument(metavar="RUN", help="The run's id, as `cotune run list` shows it.")]
FINISHED = frozenset({RunStatus.COMPLETED, RunStatus.FAILED, RunStatus.STOPPED})
POLL_SECONDS = 0.5


@app.command("create")
def create(
    file: Annotated[Path, typer.Argument(metavar="FILE.toml", help="What to train; see the README for an example.")],
    watch: Annotated[bool, typer.Option("--watch", help="Stay until the run has ended.")] = False,
    timeout: Annotated[float | None, typer.Option(min=0, help="With --watch: seconds to wait at most.")] = None,
    server: Server = None,
    output: Format = OutputFormat.TABLE,
) -> None:
    """Create a run from a TOML file. The API checks it and names every wrong field."""
    config = read_config(file)
    with connect(server) as client:
        run = client.create_run(config)
        if watch:
            _announce(run, output)
            _watch(client, run.run_id, timeout, output)
            return
    if output is OutputFormat.JSON:
        print_json(run)
    else:
        _announce(run, output)
        console().print(f"Follow it with: cotune run watch {run.run_id}")


@app.command("list")
def list_runs(server: Server = None, output: Format = OutputFormat.TABLE) -> None:
    """List every run, newest first."""
    with connect(server) as client:
        runs = sorted(client.list_runs(), key=lambda run: run.created_at, reverse=True)
    if output is OutputFormat.JSON:
        print_json(runs)
        return
    rows = [
        [
            run.run_id, run.name, run.config.strategy.name, run.status, f"{run.current_round}/{run.config.rounds}",
            f"{run.created_at:%Y-%m-%d %H:%M}", run.status_reason or "",
        ]
        for run in runs
    ]  # fmt: skip
    columns = ["Run", "Name", "Strategy", "Status", "#Round", "Created (UTC)", "Why"]
    print_table(console(), f"{len(runs)} run(s)", columns, rows)


@app.command("show")
def show(run_id: RunId, server: Server = None, output: Format = OutputFormat.TABLE) -> None:
    """Show a run: its status and why, its rounds, what each device did, the bytes that travelled."""
    with connect(server) as client:
        run = client.get_run(run_id)
        if output is OutputFormat.JSON:
            print_json(run)
            return
        rounds, traffic = client.list_rounds(run_id), client.traffic(run_id)
    out = console()
    _describe(run)
    rows = [_round_row(each, device) for each in rounds for device in each.devices]
    columns = ["#Round", "Round is", "Device", "Device is", "Stage", "Losses", "Why"]
    print_table(out, "Rounds", columns, rows)
    for direction, kinds in (("up", traffic.up), ("down", traffic.down)):
        text = ", ".join(f"{kind} {bytes_text(count)}" for kind, count in kinds.items() if count)
        out.print(f"Bytes {direction}: {text or 'none'}")


@app.command("watch")
def watch(
    run_id: RunId,
    timeout: Annotated[float | None, typer.Option(min=0, help="Seconds to wait at most; then exit code 3.")] = None,
    server: Server = None,
    output: Format = OutputFormat.TABLE,
) -> None:
    """Follow a run until it ends. Exit code 0: completed; 1: failed or stopped; 3: timed out."""
    with connect(server) as client:
        _watch(client, run_id, timeout, output)


@app.command("stop")
def stop(
    run_id: RunId,
    reason: Annotated[str, typer.Option(help="Kept with the run, shown to devices.")] = "",
    server: Server = None,
    output: Format = OutputFormat.TABLE,
) -> None:
    """End a run. Its unfinished round is abandoned; published versions stay."""
    with connect(server) as client:
        _show(client.stop_run(run_id, reason or None), output)


@app.command("pause")
def pause(
    run_id: RunId,
    reason: Annotated[str, typer.Option(help="Kept with the run until it is resumed.")] = "",
    server: Server = None,
    output: Format = OutputFormat.TABLE,
) -> None:
    """Hold a run: no round opens, nothing is offered. What devices and workers have, they may finish."""
    with connect(server) as client:
        _show(client.pause_run(run_id, reason or None), output)


@app.command("resume")
def resume(run_id: RunId, server: Server = None, output: Format = OutputFormat.TABLE) -> None:
    """Let a paused run go on; its deadlines move by the length of the pause."""
    with connect(server) as client:
        _show(client.resume_run(run_id), output)


@app.command("retry")
def retry(run_id: RunId, server: Server = None, output: Format = OutputFormat.TABLE) -> None:
    """Try a failed run again: its round opens as a new attempt from the same version, or it is prepared again."""
    with connect(server) as client:
        _show(client.retry_run(run_id), output)


@app.command("rollback")
def roll_back(
    run_id: RunId,
    version: Annotated[int, typer.Argument(metavar="VERSION", min=0, help="A promoted version to go on from.")],
    reason: Annotated[str, typer.Option(help="Kept with the versions that are withdrawn.")] = "",
    server: Server = None,
    output: Format = OutputFormat.TABLE,
) -> None:
    """Go back to an earlier version: the next round starts from it. Later ones are withdrawn, and stay to be seen."""
    with connect(server) as client:
        _show(client.roll_back_run(run_id, version, reason or None), output)


def read_config(file: Path) -> dict[str, Any]:
    """Return what a run's TOML file says, unchecked: the API checks it.

    Raises:
        BadInput: it cannot be read, or is not TOML; names the file and the line.
    """
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"cannot read {file}: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"expected TOML in {file}, got: {error}") from None


def _watch(client: ApiClient, run_id: str, timeout: float | None, output: OutputFormat) -> None:
    """Print what changes until the run ends; raise unless it completed."""
    deadline = None if timeout is None else time.monotonic() + timeout
    follower = RunWatch(client, run_id)
    before, now = None, follower.look()
    while now.run.status not in FINISHED:
        _print_changes(changes(before, now), output)
        if deadline is not None and time.monotonic() >= deadline:
            raise TimedOut(f"run {run_id} is still {now.run.status} after {timeout:.0f} s; it goes on")
        time.sleep(POLL_SECONDS)
        before, now = now, follower.look()
    _print_changes(changes(before, now), output)
    if output is OutputFormat.JSON:
        print_json(now.run)
    else:
        _describe(now.run)
    if now.run.status is not RunStatus.COMPLETED:
        raise RunFailed(f"run {run_id} {now.run.status}: {now.run.status_reason or 'no reason was given'}")


def _print_changes(lines: list[str], output: OutputFormat) -> None:
    if output is OutputFormat.TABLE:
        out = console()
        for line in lines:
            out.print(line, markup=False)


def _announce(run: Run, output: OutputFormat) -> None:
    if output is OutputFormat.TABLE:
        console().print(f"Created run [bold]{run.run_id}[/bold] ({run.name})")


def _show(run: Run, output: OutputFormat) -> None:
    if output is OutputFormat.JSON:
        print_json(run)
    else:
        _describe(run)


def _describe(run: Run) -> None:
    out = console()
    version = "none yet" if run.latest_version is None else str(run.latest_version)
    out.print(f"[bold]{run.name}[/bold] ({run.run_id})")
    out.print(f"{run.status}, round {run.current_round} of {run.config.rounds}, newest promoted version: {version}")
    if run.status_reason:
        code = f" [{run.error_code}]" if run.error_code else ""
        out.print(f"why: {run.status_reason}{code}", markup=False)
    if run.waiting:
        times = [f"{word} {time:%Y-%m-%d %H:%M:%S}Z" for word, time in _times(run.waiting) if time is not None]
        by = f", by {run.waiting.by}" if run.waiting.by else ""
        out.print(f"waits for: {run.waiting.what}{by}{', ' if times else ''}{', '.join(times)}", markup=False)


def _times(waiting: Waiting) -> list[tuple[str, datetime | None]]:
    return [("since", waiting.since), ("until", waiting.until)]


def _round_row(each: Round, device: RoundDevice) -> list[str]:
    steps = f" {device.step}/{device.steps}" if device.steps else ""
    losses = ", ".join(f"{name} {value:.3f}" for name, value in device.losses.items())
    why = device.reason or each.status_reason or ""
    return [
        str(each.number), each.status, device.device_name, device.status, f"{device.stage or ''}{steps}", losses, why,
    ]  # fmt: skip
