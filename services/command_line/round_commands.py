"""`cotune round`: the rounds of a run, and each device's share of them."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Annotated

import typer

from command_line.connection import Format, RunArgument, Server, connect
from command_line.output import (
    Columns,
    OutputFormat,
    facts_of,
    print_facts,
    print_item,
    print_items,
    print_rows,
)
from protocol.runs import Round, RoundDevice

app = typer.Typer(no_args_is_help=True, help="The rounds of a run, and each device's share of them.")


class Share(RoundDevice):
    """One device's share, with the round that it belongs to."""

    round: Round


def round_text(number: int, attempt: int) -> str:
    """Return a round's number, with the attempt at it where that is not the first."""
    return str(number) if attempt == 1 else f"{number}, attempt {attempt}"


def _told(counts: Mapping[str, int]) -> list[str]:
    return [f"{count} {status}" for status, count in counts.items()]


def _stage(share: RoundDevice) -> str:
    return f"{share.stage or ''} {share.step}/{share.steps}" if share.steps else share.stage or ""


COLUMNS: Columns[Round] = {
    "#Round": lambda each: round_text(each.number, each.attempt),
    "Status": lambda each: each.status,
    "Waits for": lambda each: each.waiting.what if each.waiting else None,
    "#From version": lambda each: each.base_version,
    "Devices": lambda each: _told(Counter(device.status for device in each.devices)),
    "Deadline (UTC)": lambda each: each.deadline_at,
    "Why": lambda each: each.status_reason,
}
SHARE_COLUMNS: Columns[Share] = {
    "#Round": lambda each: round_text(each.round.number, each.round.attempt),
    "Round is": lambda each: each.round.status,
    "Device": lambda each: each.device_name,
    "Device is": lambda each: each.status,
    "Stage": _stage,
    "Losses": lambda each: [f"{name} {value:.3f}" for name, value in each.losses.items()],
    "Why": lambda each: each.reason or each.round.status_reason,
}


@app.command("list")
def list_rounds(run_id: RunArgument, server: Server = None, output: Format = OutputFormat.TABLE) -> None:
    """List the rounds of a run and each attempt at them, oldest first."""
    with connect(server) as client:
        print_items(client.list_rounds(run_id), output, "round(s)", COLUMNS)


@app.command("show")
def show(
    run_id: RunArgument,
    number: Annotated[int, typer.Argument(metavar="ROUND", min=1, help="The round's number.")],
    attempt: Annotated[int | None, typer.Option(min=1, help="Which attempt at it; without: the newest.")] = None,
    server: Server = None,
    output: Format = OutputFormat.TABLE,
) -> None:
    """Show a round: its stage and why, its deadline, its devices. What was measured so far: --format json."""
    with connect(server) as client:
        print_item(client.get_round(run_id, number, attempt=attempt), output, _describe)


def shares(rounds: Iterable[Round]) -> list[Share]:
    """Return every device's share of every round, with its round."""
    return [Share(**device.model_dump(), round=each) for each in rounds for device in each.devices]


def _describe(each: Round) -> None:
    times = {"Opened (UTC)": each.opened_at, "Finished (UTC)": each.finished_at}
    print_facts({"Id": each.round_id} | facts_of(each, COLUMNS) | times)
    print_rows("Devices", shares([each]), SHARE_COLUMNS)
