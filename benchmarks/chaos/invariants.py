"""What must hold of a run whatever happened to it, read from the database and the blob store."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.chaos import lateness, lineage
from benchmarks.chaos.history import Adapters, History, adapters
from benchmarks.chaos.scenarios import Played, Scenario
from persistence.blobs import FolderBlobStore
from persistence.transitions import ASSIGNMENT_MOVES, JOB_MOVES, ROUND_MOVES, RUN_MOVES
from protocol.events import Event, EventType
from protocol.statuses import AssignmentStatus, JobStatus, RoundStatus, RunStatus


@dataclass(frozen=True)
class Expected:
    """What a run must have become.

    Attributes:
        attempts: every attempt at every round.
        devices: ids of those whose updates, and no others, are in every round in time.
        late: by round, ids of those whose update for an earlier round is in it too.
    """

    ends: RunStatus
    attempts: tuple[Played, ...]
    devices: frozenset[str]
    late: Mapping[int, frozenset[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, scenario: Scenario, ids: Mapping[int, str]) -> "Expected":
        """Return what a scenario must become with devices of these ids."""
        late = {number: frozenset(ids[each] for each in devices) for number, devices in scenario.late.items()}
        return cls(scenario.ends, scenario.attempts, frozenset(ids[each] for each in scenario.devices), late)

    @property
    def published(self) -> list[int]:
        """The numbers of the rounds that have a version."""
        return [number for number, _, status, _ in self.attempts if status is RoundStatus.PUBLISHED]


def violations(
    history: History,
    expected: Expected,
    *,
    receipts: Mapping[str, str],
    reference: Adapters | None,
    blobs: FolderBlobStore,
) -> list[str]:
    """Return every way in which a run that is over is not what it must be; nothing if it is.

    Args:
        receipts: assignment -> hash of the update, as the API acknowledged it.
        reference: the adapters of a run without faults; None: this is that run.
        blobs: where the adapters lie.
    """
    return [
        *_ended(history, expected),
        *_counted_once(history, expected),
        *_receipts_kept(history, receipts),
        *_legal_paths(history),
        *_jobs_done(history),
        *_same_adapters(history, reference, blobs),
        *lineage.violations(history),
        *lateness.violations(history, blobs),
    ]


def _ended(history: History, expected: Expected) -> list[str]:
    run = history.run
    found = []
    if run.status is not expected.ends:
        found.append(f"the run is {run.status.value}, not {expected.ends.value}: {run.status_reason}")
    played = tuple((each.number, each.attempt, each.status, each.base_version) for each in history.rounds)
    if played != expected.attempts:
        found.append(f"expected the rounds {_shown(expected.attempts)}, got {_shown(played)}")
    versions = [version.number for version in history.versions]
    if versions != [0, *expected.published]:
        found.append(f"expected versions 0 and {expected.published}, got {versions}")
    return found


def _shown(played: tuple[Played, ...]) -> str:
    each = [f"{number}.{attempt} {status.value} from version {base}" for number, attempt, status, base in played]
    return "; ".join(each)


def _counted_once(history: History, expected: Expected) -> list[str]:
    found = []
    in_time: dict[str, list[str]] = defaultdict(list)
    late: dict[str, list[str]] = defaultdict(list)
    for each in history.assignments:
        if each.status is AssignmentStatus.COUNTED:
            counted = in_time if each.used_in_round_id is None else late
            counted[each.used_in_round_id or each.round_id].append(each.device_id)
    versions = {version.round_id: version for version in history.versions}
    for played in history.rounds:
        published = played.status is RoundStatus.PUBLISHED
        wanted = sorted(expected.devices) if published else []
        wanted_late = sorted(expected.late.get(played.number, ())) if published else []
        name = f"round {played.number}.{played.attempt}"
        if sorted(in_time[played.id]) != wanted:
            found.append(f"{name} counted {sorted(in_time[played.id])}, not each of {wanted} once")
        if sorted(late[played.id]) != wanted_late:
            found.append(f"{name} counted late {sorted(late[played.id])}, not each of {wanted_late} once")
        version = versions.get(played.id)
        numbers = (played.metrics.get("num_updates"), version.num_updates if version else None)
        count = len(wanted) + len(wanted_late)
        if published and numbers != (count, count):
            found.append(f"{name} and its version name {numbers} updates, not {count}")
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
