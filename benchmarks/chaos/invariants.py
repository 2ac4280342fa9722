"""What must hold of a run whatever happened to it, read from the database and the blob store."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from persistence import events
from persistence.blobs import FolderBlobStore
from persistence.tables import AssignmentRow, JobRow, RoundRow, RunRow, VersionRow
from persistence.transitions import ASSIGNMENT_MOVES, JOB_MOVES, ROUND_MOVES, RUN_MOVES
from protocol.events import Event, EventType
from protocol.statuses import AssignmentStatus, JobStatus, RoundStatus, RunStatus

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


def read_history(session: Session, run_id: str) -> History:
    """Read everything about a run."""
    told: list[Event] = []
    while page := events.list_events(session, run_id=run_id, after=told[-1].sequence if told else 0, limit=PAGE):
        told += page

    def rows(table: Any, *order: Any) -> list[Any]:
        return list(session.scalars(select(table).where(table.run_id == run_id).order_by(*order)))

    return History(
        run=session.get_one(RunRow, run_id),
        rounds=rows(RoundRow, RoundRow.number),
        assignments=rows(AssignmentRow, AssignmentRow.id),
        versions=rows(VersionRow, VersionRow.number),
        jobs=rows(JobRow, JobRow.id),
        events=told,
    )


def adapters(history: History) -> Adapters:
    """Return the hashes of every version's adapters."""
    return {each.number: (each.proxy_adapter_sha256, each.llm_adapter_sha256) for each in history.versions}


def violations(
    history: History,
    *,
    rounds: int,
    devices: Sequence[str],
    receipts: Mapping[str, str],
    reference: Adapters | None,
    blobs: FolderBlobStore,
) -> list[str]:
    """Return every way in which a run that is over is not what it must be; nothing if it is.

    Args:
        rounds: how many it had to play.
        devices: whose updates, and no others, are in every round.
        receipts: assignment -> hash of the update, as the API acknowledged it.
        reference: the adapters of a run without faults; None: this is that run.
        blobs: where the adapters lie.
    """
    return [
        *_completed(history, rounds),
        *_counted_once(history, set(devices)),
        *_receipts_kept(history, receipts),
        *_legal_paths(history),
        *_jobs_done(history),
        *_same_adapters(history, reference, blobs),
    ]


def _completed(history: History, rounds: int) -> list[str]:
    run = history.run
    found = []
    if run.status is not RunStatus.COMPLETED:
        found.append(f"the run is {run.status.value}: {run.status_reason}")
    numbers = [(each.number, each.status.value) for each in history.rounds]
    if numbers != [(number, RoundStatus.PUBLISHED.value) for number in range(1, rounds + 1)]:
        found.append(f"expected rounds 1 to {rounds} published, got {numbers}")
    if [version.number for version in history.versions] != list(range(rounds + 1)):
        found.append(f"expected versions 0 to {rounds}, got {[version.number for version in history.versions]}")
    return found


def _counted_once(history: History, devices: set[str]) -> list[str]:
    found = []
    by_round: dict[str, list[str]] = defaultdict(list)
    for each in history.assignments:
        if each.status is AssignmentStatus.COUNTED:
            by_round[each.round_id].append(each.device_id)
    versions = {version.round_id: version for version in history.versions}
    for played in history.rounds:
        counted = by_round[played.id]
        if len(counted) != len(set(counted)) or set(counted) != devices:
            found.append(f"round {played.number} counted {sorted(counted)}, not each of {sorted(devices)} once")
        version = versions.get(played.id)
        numbers = (played.metrics.get("num_updates"), version.num_updates if version else None)
        if numbers != (len(devices), len(devices)):
            found.append(f"round {played.number} and its version name {numbers} updates, not {len(devices)}")
    moves = Counter(
        event.data["assignment_id"]
        for event in history.events
        if event.type is EventType.ASSIGNMENT_STATUS_CHANGED and event.data["to"] == AssignmentStatus.COUNTED.value
    )
    found += [f"assignment {name} became counted {times} times" for name, times in moves.items() if times != 1]
    return found


def _receipts_kept(history: History, receipts: Mapping[str, str]) -> list[str]:
    """What was acknowledged is counted, or refused with a reason that its device can read."""
    found = []
    kept = {AssignmentStatus.COUNTED, AssignmentStatus.REJECTED}
    for each in history.assignments:
        if (promised := receipts.get(each.id)) is None:
            continue
        if each.update_sha256 != promised:
            found.append(f"assignment {each.id}: the receipt names {promised}, the database {each.update_sha256}")
        if each.status not in kept or (each.status is AssignmentStatus.REJECTED and not each.reason):
            found.append(f"assignment {each.id} has a receipt and is {each.status.value}: {each.reason}")
    return found


def _legal_paths(history: History) -> list[str]:
    """Every thing's events are one path through its table, and it ends in the status that its row has."""
    found: list[str] = []
    at: dict[str, str] = {}
    tables: dict[str, Mapping[Any, frozenset[Any]]] = {}
    last = 0
    for event in history.events:
        if event.sequence <= last:
            found.append(f"event {event.sequence} comes after {last}")
        last = event.sequence
        if (subject := _subject(event)) is None:
            continue
        name, table = subject
        tables[name] = table
        before, after = event.data["from"], event.data["to"]
        if at.get(name, before) != before:
            found.append(f"{name} went from {before} to {after}, but was {at[name]}")
        if after not in {status.value for status in table[type(next(iter(table)))(before)]}:
            found.append(f"{name} went from {before} to {after}, which is not allowed")
        at[name] = after
    rows: list[Any] = [history.run, *history.rounds, *history.assignments, *history.jobs]
    found += [
        f"{row.id} is {row.status.value}; its events end in {at[row.id]}"
        for row in rows
        if row.id in at and at[row.id] != row.status.value
    ]
    return found


def _subject(event: Event) -> tuple[str, Mapping[Any, frozenset[Any]]] | None:
    if "from" not in event.data:
        return None
    match event.type:
        case EventType.RUN_STATUS_CHANGED:
            return str(event.run_id), RUN_MOVES
        case EventType.ROUND_STATUS_CHANGED:
            return str(event.round_id), ROUND_MOVES
        case EventType.ASSIGNMENT_STATUS_CHANGED:
            return event.data["assignment_id"], ASSIGNMENT_MOVES
        case EventType.JOB_CLAIMED | EventType.JOB_DONE | EventType.JOB_RESENT | EventType.JOB_FAILED:
            return event.data["job_id"], JOB_MOVES
    return None


def _jobs_done(history: History) -> list[str]:
    found = [
        f"job {job.id} ({job.kind.value}) is {job.status.value}: {job.reason}"
        for job in history.jobs
        if job.status is not JobStatus.DONE
    ]
    twice = Counter((job.kind.value, job.subject_id) for job in history.jobs)
    return found + [f"{times} jobs of {kind} for {name}" for (kind, name), times in twice.items() if times > 1]


def _same_adapters(history: History, reference: Adapters | None, blobs: FolderBlobStore) -> list[str]:
    found = []
    mine = adapters(history)
    for number, expected in (reference or {}).items():
        if mine.get(number) != expected:
            found.append(f"version {number}: adapters {mine.get(number)}, without faults {expected}")
    for sha256 in {each for pair in mine.values() for each in pair if each is not None}:
        if not blobs.exists(sha256):
            found.append(f"the store has no file {sha256}")
        elif hashlib.sha256(blobs.path(sha256).read_bytes()).hexdigest() != sha256:
            found.append(f"the file {sha256} holds other bytes")
    return found
