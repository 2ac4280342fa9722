"""`cotune update`: what devices sent to a run, and what became of it."""

from enum import StrEnum
from typing import Annotated

import typer

from command_line.connection import Format, RunArgument, Server, connect
from command_line.output import Columns, OutputFormat, print_items
from command_line.round_commands import round_text
from protocol.runs import Round, RoundDevice, RoundMetrics
from protocol.statuses import AssignmentStatus

app = typer.Typer(no_args_is_help=True, help="What devices sent to a run, and what became of it.")


class UpdateStatus(StrEnum):
    """The statuses of a device's share in which there is, or was, an update."""

    SUBMITTED = AssignmentStatus.SUBMITTED.value
    COUNTED = AssignmentStatus.COUNTED.value
    QUARANTINED = AssignmentStatus.QUARANTINED.value
    REJECTED = AssignmentStatus.REJECTED.value
    LATE = AssignmentStatus.LATE.value


class Update(RoundDevice):
    """A device's share whose update came, with its round."""

    round_number: int
    attempt: int
    norm: float | None
    """L2 norm of its delta, once measured."""


def _counts_in(update: Update) -> str | None:
    if update.used_in_round is not None:
        return f"round {update.used_in_round}, {update.staleness} version(s) old"
    return f"round {update.round_number}" if update.status is AssignmentStatus.COUNTED else None


COLUMNS: Columns[Update] = {
    "#Round": lambda each: round_text(each.round_number, each.attempt),
    "Device": lambda each: each.device_name,
    "Update is": lambda each: each.status,
    "#Rows": lambda each: each.num_examples,
    "#Norm": lambda each: each.norm,
    "Submitted (UTC)": lambda each: each.submitted_at,
    "Counts in": _counts_in,
    "Why": lambda each: each.reason,
}


@app.command("list")
def list_updates(
    *,
    run_id: RunArgument,
    number: Annotated[int | None, typer.Option("--round", min=1, help="Only of this round.")] = None,
    statuses: Annotated[
        list[UpdateStatus] | None, typer.Option("--status", help="Only in this status; repeat for several.")
    ] = None,
    server: Server = None,
    output: Format = OutputFormat.TABLE,
) -> None:
    """List the updates that came for a run: counted, quarantined, rejected or late, with the reason.

    A quarantined update is kept and stays uncounted; its round is over. docs/rounds.md says what becomes of which.
    """
    with connect(server) as client:
        rounds = [each for each in client.list_rounds(run_id) if number in (None, each.number)]
    wanted = set(statuses or UpdateStatus)
    updates = [each for each in updates_of(rounds) if each.status.value in wanted]
    print_items(updates, output, "update(s)", COLUMNS)


def updates_of(rounds: list[Round]) -> list[Update]:
    """Return what was sent for these rounds, in their order."""
    came = {each.value for each in UpdateStatus}
    found: list[Update] = []
    for each in rounds:
        norms = RoundMetrics.model_validate(each.metrics).update_norms
        found += [
            Update(
                **device.model_dump(),
                round_number=each.number,
                attempt=each.attempt,
                norm=norms.get(device.device_id),
            )
            for device in each.devices
            if device.status.value in came
        ]
    return found
