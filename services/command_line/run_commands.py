"""`cotune run`: create, see, follow, hold, retry, roll back and stop runs."""

import json
import time
import tomllib
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from command_line.api_client import ApiClient
from command_line.connection import Format, RunArgument, Server, connect
from command_line.errors import BadInput, RunFailed, TimedOut
from command_line.output import (
    Columns,
    OutputFormat,
    bytes_text,
    cell,
    console,
    print_item,
    print_items,
    print_json,
    print_rows,
)
from command_line.round_commands import SHARE_COLUMNS, shares
from command_line.watching import RunWatch, changes
from protocol.events import Event
from protocol.runs import Run, Waiting
from protocol.statuses import RunStatus

app = typer.Typer(no_args_is_help=True, help="Create, see, follow, pause, resume, retry, roll back and stop runs.")

FINISHED = frozenset({RunStatus.COMPLETED, RunStatus.FAILED, RunStatus.STOPPED})
POLL_SECONDS = 0.5

COLUMNS: Columns[Run] = {
    "@Run": lambda each: each.run_id,
    "Name": lambda each: each.name,
    "Strategy": lambda each: each.config.strategy.name,
    "Federation": lambda each: each.federation,
    "Status": lambda each: each.status,
    "#Round": lambda each: f"{each.current_round}/{each.config.rounds}",
    "Created (UTC)": lambda each: each.created_at,
    "Why": lambda each: each.status_reason,
}


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
            if output is OutputFormat.TABLE:
                _announce(run)
            _watch(client, run.run_id, timeout, output)
        else:
            print_item(run, output, _introduce)


@app.command("list")
def list_runs(
    status: Annotated[RunStatus | None, typer.Option(help="Only runs in this status.")] = None,
    federation: Annotated[str | None, typer.Option(help="Only runs of this federation.")] = None,
    server: Server = None,
    output: Format = OutputFormat.TABLE,
) -> None:
    """List every run, newest first."""
    with connect(server) as client:
        print_items(client.list_runs(status=status, federation=federation), output, "run(s)", COLUMNS)


@app.command("show")
def show(run_id: RunArgument, server: Server = None, output: Format = OutputFormat.TABLE) -> None:
    """Show a run: its status and why, its rounds, what each device did, the bytes that travelled."""
    with connect(server) as client:
        run = client.get_run(run_id)
        print_item(run, output, _describe)
        if output is OutputFormat.JSON:
            return
        rounds, traffic = client.list_rounds(run_id), client.traffic(run_id)
    out = console()
    print_rows("Rounds", shares(rounds), SHARE_COLUMNS)
    for direction, kinds in (("up", traffic.up), ("down", traffic.down)):
        text = ", ".join(f"{kind} {bytes_text(count)}" for kind, count in kinds.items() if count)
        out.print(f"Bytes {direction}: {text or 'none'}")


@app.command("watch")
def watch(
    run_id: RunArgument,
    timeout: Annotated[float | None, typer.Option(min=0, help="Seconds to wait at most; then exit code 3.")] = None,
    server: Server = None,
    output: Format = OutputFormat.TABLE,
) -> None:
    """Follow a run until it ends. Exit code 0: completed; 1: failed or stopped; 3: timed out."""
    with connect(server) as client:
        _watch(client, run_id, timeout, output)


@app.command("events")
def events(
    *,
    run_id: RunArgument,
    after: Annotated[int, typer.Option(min=0, help="Only events after this number.")] = 0,
    follow: Annotated[bool, typer.Option("--follow", help="Stay until the run has ended.")] = False,
    timeout: Annotated[float | None, typer.Option(min=0, help="With --follow: seconds to wait at most.")] = None,
    server: Server = None,
    output: Format = OutputFormat.TABLE,
) -> None:
    """List what happened in a run, oldest first, one line an event. With --follow --format json: one object a line."""
    with connect(server) as client:
        if follow:
            _follow(client, run_id, after, timeout, output)
        elif output is OutputFormat.JSON:
            print_json(_events(client, run_id, after))
        else:
            for event in _events(client, run_id, after):
                _print_event(event, output)


@app.command("stop")
def stop(
    run_id: RunArgument,
    reason: Annotated[str, typer.Option(help="Kept with the run, shown to devices.")] = "",
    server: Server = None,
    output: Format = OutputFormat.TABLE,
) -> None:
    """End a run. Its unfinished round is abandoned; published versions stay."""
    with connect(server) as client:
        print_item(client.stop_run(run_id, reason or None), output, _describe)


@app.command("pause")
def pause(
    run_id: RunArgument,
    reason: Annotated[str, typer.Option(help="Kept with the run until it is resumed.")] = "",
    server: Server = None,
    output: Format = OutputFormat.TABLE,
) -> None:
    """Hold a run: no round opens, nothing is offered. What devices and workers have, they may finish."""
    with connect(server) as client:
        print_item(client.pause_run(run_id, reason or None), output, _describe)


@app.command("resume")
def resume(run_id: RunArgument, server: Server = None, output: Format = OutputFormat.TABLE) -> None:
    """Let a paused run go on; its deadlines move by the length of the pause."""
    with connect(server) as client:
        print_item(client.resume_run(run_id), output, _describe)


@app.command("retry")
def retry(run_id: RunArgument, server: Server = None, output: Format = OutputFormat.TABLE) -> None:
    """Try a failed run again: its round opens as a new attempt from the same version, or it is prepared again."""
    with connect(server) as client:
        print_item(client.retry_run(run_id), output, _describe)


@app.command("rollback")
def roll_back(
    run_id: RunArgument,
    version: Annotated[int, typer.Argument(metavar="VERSION", min=0, help="A promoted version to go on from.")],
    reason: Annotated[str, typer.Option(help="Kept with the versions that are withdrawn.")] = "",
    server: Server = None,
    output: Format = OutputFormat.TABLE,
) -> None:
    """Go back to an earlier version: the next round starts from it. Later ones are withdrawn, and stay to be seen."""
    with connect(server) as client:
        print_item(client.roll_back_run(run_id, version, reason or None), output, _describe)


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
    print_item(now.run, output, _describe)
    if now.run.status is not RunStatus.COMPLETED:
        raise RunFailed(f"run {run_id} {now.run.status}: {now.run.status_reason or 'no reason was given'}")


def _print_changes(lines: list[str], output: OutputFormat) -> None:
    if output is OutputFormat.TABLE:
        out = console()
        for line in lines:
            out.print(line, markup=False)


def _announce(run: Run) -> None:
    console().print(f"Created run [bold]{run.run_id}[/bold] ({run.name})")


def _introduce(run: Run) -> None:
    _announce(run)
    console().print(f"Follow it with: cotune run watch {run.run_id}")


def _events(client: ApiClient, run_id: str, after: int) -> list[Event]:
    """Every event of a run after a number, that there is by now."""
    found: list[Event] = []
    while more := client.events(run_id, after=found[-1].sequence if found else after, limit=1000):
        found += more
    return found


def _follow(client: ApiClient, run_id: str, after: int, timeout: float | None, output: OutputFormat) -> None:
    """Print events as they come, until the run has ended and its last one is printed."""
    deadline = None if timeout is None else time.monotonic() + timeout
    finished = False
    while not finished:
        # Asked first: what is written before a run ends is then among the events.
        finished = client.get_run(run_id).status in FINISHED
        for event in _events(client, run_id, after):
            _print_event(event, output)
            after = event.sequence
        if not finished:
            if deadline is not None and time.monotonic() >= deadline:
                raise TimedOut(f"run {run_id} has not ended after {timeout:.0f} s; it goes on")
            time.sleep(POLL_SECONDS)


def _print_event(event: Event, output: OutputFormat) -> None:
    if output is OutputFormat.JSON:
        typer.echo(event.model_dump_json())
    else:
        said = [event.device_id] if event.device_id else []
        said += [f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in event.data.items()]
        typer.echo(f"{event.sequence:>6}  {cell(event.time)}  {event.type:<26} {' '.join(said)}".rstrip())


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
