"""A run as the database has it, read when it is over."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from persistence import events
from persistence.tables import AssignmentRow, JobRow, RoundRow, RunRow, UpdatePartRow, VersionRow
from protocol.events import Event
from protocol.statuses import PartKind

PAGE = 1000
Adapters = dict[int, tuple[str | None, str | None]]
"""Version -> SHA-256 of the shared adapter and of the LLM's."""


@dataclass(frozen=True)
class History:
    """A run as the database has it."""

    run: RunRow
    rounds: list[RoundRow]
    assignments: list[AssignmentRow]
    versions: list[VersionRow]
    jobs: list[JobRow]
    events: list[Event]
    deltas: dict[str, str]
    """Assignment -> SHA-256 of the delta that the service has of it."""


def as_of_one_moment(session: Session) -> None:
    """Let all that a new session reads be as it was at one moment."""
    if session.get_bind().dialect.name == "postgresql":  # SQLite's transactions see one moment anyway
        session.connection(execution_options={"isolation_level": "REPEATABLE READ"})


def read_history(session: Session, run_id: str) -> History:
    """Read everything about a run, as it was at one moment: devices may still be told that they come too late."""
    as_of_one_moment(session)
    told: list[Event] = []
    while page := events.list_events(session, run_id=run_id, after=told[-1].sequence if told else 0, limit=PAGE):
        told += page

    def rows(table: Any, *order: Any) -> list[Any]:
        return list(session.scalars(select(table).where(table.run_id == run_id).order_by(*order)))

    return History(
        run=session.get_one(RunRow, run_id),
        rounds=rows(RoundRow, RoundRow.number, RoundRow.attempt),
        assignments=rows(AssignmentRow, AssignmentRow.id),
        versions=rows(VersionRow, VersionRow.number),
        jobs=rows(JobRow, JobRow.id),
        events=told,
        deltas={row.assignment_id: row.sha256 for row in session.scalars(_deltas(run_id))},
    )


def _deltas(run_id: str) -> Select[UpdatePartRow]:
    return (
        select(UpdatePartRow)
        .join(AssignmentRow, AssignmentRow.id == UpdatePartRow.assignment_id)
        .where(AssignmentRow.run_id == run_id, UpdatePartRow.kind == PartKind.ADAPTER_DELTA)
    )


def adapters(history: History) -> Adapters:
    """Return the hashes of every version's adapters."""
    return {each.number: (each.proxy_adapter_sha256, each.llm_adapter_sha256) for each in history.versions}
