"""One cycle, aloud: deliver what waits, ask for work, fetch what is missing, train, store, deliver.

`run_once` is the whole of it. It holds no state of its own: whatever a cycle must remember is on disk before it counts,
so a cycle may be killed anywhere and the next one goes on.
"""

import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from itertools import count
from pathlib import Path
from typing import Protocol, TypeVar

import structlog

import tracing
from assets.errors import is_panic
from edge_agent.backoff import Backoff, Retrier
from edge_agent.cache import ArtifactCache
from edge_agent.client import CloudClient
from edge_agent.errors import AgentError, Cancelled, CannotTrain, CloudRefused, NotAuthorised, UnknownStrategy
from edge_agent.local_state import LocalState, LocalStates, WriteState
from edge_agent.outbox import Outbox, OutboxEntry
from edge_agent.reporting import GONE, TrainingReporter
from edge_agent.rotation import CredentialRotation
from edge_agent.uploading import AT_ONCE_BYTES, upload_file
from protocol.assignments import (
    Assignment,
    AssignmentName,
    AssignmentProgress,
    AssignmentRefusal,
    ModelFingerprint,
    Part,
    Submission,
    SubmissionReceipt,
)
from protocol.errors import ErrorCode
from protocol.runs import DeviceMetrics
from protocol.statuses import AssignmentStatus, PartKind
from protocol.strategies import DownloadKind, spec_of

Trained = TypeVar("Trained")

POLL_WAIT_SECONDS = 20
"""How long the server may hold a poll open. Shorter would mean more polls, not sooner work."""

log = structlog.get_logger(__name__)


class Outcome(StrEnum):
    """How a cycle ended."""

    IDLE = "idle"  # There is no work.
    SUBMITTED = "submitted"  # The server has an update, durably.
    LATE = "late"  # The round had closed, or the run had ended.
    REFUSED = "refused"  # This device could not do it, or the server would not have what it did.


@dataclass(frozen=True)
class RoundFiles:
    """What was downloaded for a round."""

    proxy_folder: Path | None
    adapter: Path | None
    probe_set: Path | None
    expected_slm: ModelFingerprint | None = None
    """What this device's own small model must be."""
    message: Path | None = None
    """What the server sent all devices."""
    llm_vocabulary: Path | None = None


@dataclass(frozen=True)
class TrainedUpdate:
    """What training gives back: bytes to upload, numbers, and a way to write down what stays here."""

    parts: dict[PartKind, bytes]
    num_examples: int
    metrics: DeviceMetrics
    write_state: WriteState


class Trainer(Protocol):
    """Trains one assignment. Implemented in `edge_agent.training`, which imports torch."""

    def train(
        self,
        assignment: Assignment,
        files: RoundFiles,
        start: LocalState | None,
        on_progress: Callable[[str, int, int, dict[str, float]], None],
    ) -> TrainedUpdate:
        """Train from the local state `start`; the same arguments give the same bytes.

        Raises:
            CannotTrain: this device cannot do it.
            AgentError: whatever `on_progress` raises.
        """
        ...

    def last_step(
        self,
        assignment: Assignment,
        files: RoundFiles,
        start: LocalState,
        on_progress: Callable[[str, int, int, dict[str, float]], None],
    ) -> WriteState | None:
        """Learn once more after the last round, which left `start`; None: nothing changes. Raises as `train`."""
        ...


@dataclass(frozen=True)
class Agent:
    """Everything a cycle works with."""

    client: CloudClient
    retrier: Retrier
    new_backoff: Callable[[], Backoff]
    stop: threading.Event
    cache: ArtifactCache
    outbox: Outbox
    states: LocalStates
    trainer: Callable[[], Trainer]
    rotation: CredentialRotation | None = None
    """Replaces the device's credential between two cycles."""
    at_once_bytes: int = AT_ONCE_BYTES
    """Larger files are sent in chunks."""


def run_once(agent: Agent, *, wait_seconds: int = POLL_WAIT_SECONDS) -> Outcome:
    """Do one cycle.

    Raises:
        Stopped: the process shall stop.
        CloudUnavailable: the poll was not answered; ask again later.
        NotAuthorised: the server does not accept this device.
    """
    waiting = agent.outbox.pending()
    if waiting:
        return [deliver(agent, entry, again=True) for entry in waiting][-1]
    try:
        assignment = agent.client.next_assignment(wait_seconds)
    except UnknownStrategy as error:
        return refuse(agent, error.assignment, CannotTrain(ErrorCode.UNKNOWN_STRATEGY, error.reason))
    if assignment is None:
        return Outcome.IDLE
    with about(assignment, "assignment"):
        return work_on(agent, assignment)


@contextmanager
def about(assignment: Assignment, doing: str) -> Iterator[None]:
    """Name the assignment in each log line and, where traces are on, in a span."""
    ids = {"run_id": assignment.run_id, "assignment_id": assignment.assignment_id}
    number = assignment.round_number
    with (
        structlog.contextvars.bound_contextvars(**ids, round_number=number),
        tracing.span(doing, **ids, round_number=str(number)),
    ):
        yield


def work_on(agent: Agent, assignment: Assignment) -> Outcome:
    """Accept, fetch, train, store and deliver one assignment."""
    log.info("assignment_received", strategy=assignment.strategy.name, deadline_at=assignment.deadline_at.isoformat())
    try:
        if assignment.status is AssignmentStatus.OFFERED:
            report(agent, assignment, AssignmentStatus.ACCEPTED)
        check_assignment(assignment)
        entry = train(agent, assignment)
    except CannotTrain as error:
        return refuse(agent, assignment, error)
    except Cancelled as error:
        log.warning("training_cancelled", reason=str(error))
        return Outcome.LATE
    except NotAuthorised:
        raise
    except CloudRefused as error:
        if error.status in GONE:
            log.warning("assignment_gone", reason=str(error))
            return Outcome.LATE
        return refuse(agent, assignment, CannotTrain(error.code, error.detail))
    return deliver(agent, entry)


def check_assignment(assignment: Assignment) -> None:
    """Raise `CannotTrain` if the assignment asks for something that its strategy must not or cannot give."""
    spec = spec_of(assignment.strategy)
    if not spec.deployable:
        raise CannotTrain(
            "not_deployable", f"strategy {spec.name} is for simulations: private rows would have to leave"
        )
    undeclared = set(assignment.uploads) - spec.parts
    if undeclared:
        raise CannotTrain("undeclared_upload", f"strategy {assignment.strategy.name} must not upload {undeclared}")
    if assignment.message is not None and spec.received_message is None:
        raise CannotTrain("undeclared_message", f"strategy {spec.name} has no message of the server, one was sent")
    files = {
        DownloadKind.PROXY_BASE: assignment.proxy_manifest,
        DownloadKind.MODEL_MANIFEST: assignment.proxy_manifest,
        DownloadKind.ADAPTER: assignment.adapter,
        DownloadKind.PROBE_SET: assignment.probe_set,
        DownloadKind.LLM_VOCABULARY: assignment.llm_vocabulary,
    }
    missing = sorted(kind for kind, file in files.items() if kind in spec.downloads and file is None)
    if missing:
        raise CannotTrain("incomplete_assignment", f"expected the assignment to name {', '.join(missing)}")


def train(agent: Agent, assignment: Assignment) -> OutboxEntry:
    """Fetch what is missing, train, and store the update durably."""
    started = time.monotonic()
    files = fetch(agent, assignment)
    seconds = {"download": round(time.monotonic() - started, 3)}
    start = agent.states.before(assignment.run_id, assignment.round_number)
    log.info("training_started", from_round=start.record.round_number if start else None)
    reporter = TrainingReporter(agent.client, assignment, agent.stop, backoff=agent.new_backoff(), clock=time.monotonic)
    with reporter:
        reporter.check()
        update = told(partial(agent.trainer().train, assignment, files, start, reporter.on_progress))
    metrics = update.metrics.model_copy(update={"seconds_by_stage": seconds | update.metrics.seconds_by_stage})
    check_sizes(assignment, update)

    def submission(parts: list[Part]) -> Submission:
        base = assignment.adapter.sha256 if assignment.adapter else None
        return Submission(base_sha256=base, num_examples=update.num_examples, parts=parts, metrics=metrics)

    entry = agent.outbox.put(assignment, update.parts, update.write_state, submission)
    agent.states.end_training(assignment.run_id)
    log.info("training_done", num_examples=update.num_examples, seconds=metrics.seconds_by_stage)
    return entry


def told(train: Callable[[], Trained]) -> Trained:
    """Train; whatever goes wrong in there becomes a reason that the server can be told."""
    try:
        return train()
    except AgentError:
        raise
    except BaseException as error:
        if not (isinstance(error, Exception) or is_panic(error)):
            raise
        # The edge of foreign code: one bad model or row must not end the agent. A message may quote data, so neither
        # the log nor the server gets it; the kind of error and its place are enough to find it.
        frames = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
        log.error("training_failed", error=type(error).__name__, frames=frames[-8:])
        log.debug("training_failed_message", message=str(error))
        code = "out_of_memory" if is_out_of_memory(error) else "training_failed"
        raise CannotTrain(code, f"{type(error).__name__} at {frames[-1]}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that memory ran out: torch's CPU allocator raises a plain `RuntimeError`."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "not enough memory" in str(error)
        or "can't allocate memory" in str(error)
    )


def fetch(agent: Agent, assignment: Assignment) -> RoundFiles:
    """Download what this device lacks of the round's files, and nothing that the strategy has not declared."""
    spec = spec_of(assignment.strategy)
    given = spec.downloads
    proxy = assignment.proxy_manifest if DownloadKind.PROXY_BASE in given else None
    manifest = assignment.proxy_manifest if DownloadKind.MODEL_MANIFEST in given else None
    adapter = assignment.adapter if DownloadKind.ADAPTER in given else None
    probe_set = assignment.probe_set if DownloadKind.PROBE_SET in given else None
    vocabulary = assignment.llm_vocabulary if DownloadKind.LLM_VOCABULARY in given else None
    message = assignment.message if spec.received_message is not None else None
    return RoundFiles(
        proxy_folder=agent.cache.fetch_model(agent.client, proxy) if proxy else None,
        adapter=agent.cache.fetch(agent.client, adapter) if adapter else None,
        probe_set=agent.cache.fetch(agent.client, probe_set, ".jsonl") if probe_set else None,
        expected_slm=agent.cache.fetch_manifest(agent.client, manifest).fingerprint if manifest else None,
        message=agent.cache.fetch(agent.client, message) if message else None,
        llm_vocabulary=agent.cache.fetch(agent.client, vocabulary) if vocabulary else None,
    )


def check_sizes(assignment: Assignment, update: TrainedUpdate) -> None:
    """Raise `CannotTrain` if the update is not what the server will take."""
    given, asked = set(update.parts), set(assignment.uploads)
    if not asked - set(assignment.optional_uploads) <= given <= asked:
        raise CannotTrain(
            "update_incomplete", f"expected {sorted(assignment.uploads)}, training gave {sorted(update.parts)}"
        )
    for kind, content in update.parts.items():
        limit = assignment.upload_limits.get(kind)
        if limit is not None and len(content) > limit:
            raise CannotTrain("body_too_large", f"{kind.value}: expected at most {limit} bytes, got {len(content)}")


def deliver(agent: Agent, entry: OutboxEntry, *, again: bool = False) -> Outcome:
    """Upload and submit an update that is on disk, then make its local state the current one.

    `again` says that an earlier process may have sent some or all of it.
    """
    assignment = entry.assignment
    with about(assignment, "delivery"):
        if entry.receipt is None:
            try:
                send(agent, entry, again=again)
            except NotAuthorised:
                raise
            except CloudRefused as error:
                agent.outbox.drop(entry)
                if error.status in GONE and error.code != ErrorCode.UPDATE_CONFLICT:
                    log.warning("update_late", reason=str(error))
                    return Outcome.LATE
                return refuse(agent, assignment, CannotTrain(error.code, error.detail))
        replaced = agent.states.adopt(entry.state_folder)
        agent.outbox.drop(entry)
        current = {file.sha256 for file in (assignment.adapter, assignment.message) if file is not None}
        for sha256 in sorted({each for record in replaced for each in record.files} - current):
            agent.cache.discard(sha256)
        return Outcome.SUBMITTED


def send(agent: Agent, entry: OutboxEntry, *, again: bool) -> None:
    """Upload every part, submit, and keep the receipt."""
    assignment, submission = entry.assignment, entry.submission

    def submit() -> SubmissionReceipt:
        return agent.retrier.call("submit", lambda: agent.client.submit(assignment, submission))

    receipt = submitted_before(submit) if again else None
    if receipt is None:
        announce_upload(agent, assignment)
        for part in submission.parts:
            attempts = count()
            upload = partial(
                upload_file, agent.client, assignment, part, entry.file(part), at_once_bytes=agent.at_once_bytes
            )
            agent.retrier.call("upload", lambda: upload(fresh=not again and next(attempts) == 0))  # noqa: B023
        receipt = submit()
    entry.keep_receipt(receipt)
    log.info("update_submitted", update_sha256=receipt.update_sha256, parts=len(submission.parts))


def submitted_before(submit: Callable[[], SubmissionReceipt]) -> SubmissionReceipt | None:
    """Return the receipt if the parts had all arrived before the agent was restarted, and None if some have not."""
    try:
        return submit()
    except CloudRefused as error:
        if error.code == ErrorCode.UPDATE_INCOMPLETE:
            return None
        raise


def announce_upload(agent: Agent, assignment: Assignment) -> None:
    """Say that the upload begins. Only the upload itself decides, so a no is only noted."""
    try:
        report(agent, assignment, AssignmentStatus.UPLOADING)
    except NotAuthorised:
        raise
    except CloudRefused as error:
        log.warning("report_refused", error=str(error))


def report(agent: Agent, assignment: Assignment, status: AssignmentStatus) -> None:
    """Report a change of status, and wait until the server knows it."""
    progress = AssignmentProgress.model_validate({"status": status})
    agent.retrier.call("progress", lambda: agent.client.report_progress(assignment, progress))


def refuse(agent: Agent, assignment: AssignmentName, error: CannotTrain) -> Outcome:
    """Tell the server that and why this device does not do an assignment."""
    log.error("assignment_refused", code=error.code, reason=error.reason)
    refusal = AssignmentRefusal(code=error.code, reason=error.reason)
    try:
        agent.retrier.call("refusal", lambda: agent.client.refuse(assignment, refusal))
    except NotAuthorised:
        raise
    except CloudRefused as refused:
        log.warning("refusal_refused", reason=str(refused))
    return Outcome.REFUSED
