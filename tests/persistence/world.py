"""The moves of a run, one line each, on a real database. The clock stands still unless a test moves it."""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from threading import Barrier
from typing import Any, TypeVar

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from persistence import artifacts, assignments, enrolment, events, jobs, results, rounds, runs, updates
from persistence.database import Database
from persistence.jobs import JobRecord
from persistence.results import PrepareResult
from persistence.table_base import Table
from persistence.tables import AssignmentRow, JobRow, RoundRow
from protocol.assignments import Assignment, AssignmentProgress, Part, Submission, SubmissionReceipt
from protocol.devices import DeviceProfile, EnrolmentRequest, EnrolmentTokenCreate
from protocol.events import Event
from protocol.runs import DeviceMetrics, Round, Run, RunCreate
from protocol.safetensors_header import TensorInfo
from protocol.statuses import AssignmentStatus, JobKind, JobStatus, PartKind

START = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
LIMITS = {PartKind.ADAPTER_DELTA: 1000, PartKind.LOGITS: 500}
TENSORS = {"layer.lora_A.weight": TensorInfo("F32", (8, 16))}
PROFILE = DeviceProfile(
    agent_version="0.1.0",
    platform="Linux x86_64",
    cpu_count=2,
    memory_bytes=4_000_000_000,
    model_name="tiny",
    model_architecture="gpt2",
    model_parameters=1000,
    tokenizer_kind="byte-level BPE, 512 tokens",
    domain="web",
    num_examples=40,
)
Answer = TypeVar("Answer")


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class World:
    """A database, a clock, and what can happen."""

    def __init__(self, database: Database, sent: list[str]) -> None:
        self.database = database
        self.sent = sent
        self.now = START

    def wait(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    def call(self, function: Callable[..., Answer], *arguments: Any, **named: Any) -> Answer:
        """Run one function of the package in a transaction of its own."""
        with self.database.transaction() as session:
            return function(session, *arguments, **named)

    def enrol(self, name: str) -> str:
        with self.database.transaction() as session:
            token = enrolment.create_token(session, EnrolmentTokenCreate(), self.now)
            session.flush()
            request = EnrolmentRequest(token=token.token, name=name, profile=PROFILE)
            return enrolment.enrol(session, request, self.now).device_id

    def enrol_many(self, *names: str) -> list[str]:
        """Enrol one a second, so that the ids are in the order of the names."""
        ids = []
        for name in names:
            self.wait(1)
            ids.append(self.enrol(name))
        return ids

    def create_run(self, strategy: str = "co_plms", **settings: Any) -> Run:
        values = {"name": "run", "strategy": {"name": strategy}, "rounds": 2, "llm": "llm", "public_data": "public"}
        return self.call(runs.create_run, RunCreate.model_validate({**values, **settings}), self.now)

    def start_run(self, strategy: str = "co_plms", **settings: Any) -> Run:
        """Create a run and prepare it: round 1 is open."""
        run = self.create_run(strategy, **settings)
        self.prepare(run.run_id)
        return run

    def prepare(self, run_id: str, owner: str = "worker") -> None:
        job = self.claim(self.job_id(JobKind.PREPARE_RUN, run_id), owner)
        assert job is not None
        self.call(self.finish_prepare, job, owner)

    def finish_prepare(self, session: Session, job: JobRecord, owner: str) -> None:
        run = runs.get_run(session, job.run_id)
        result = PrepareResult()
        if run.config.strategy.name == "co_plms":
            for kind in ("proxy_base", "adapter", "llm_adapter", "probe_set"):
                artifacts.register(session, sha(kind), 100, kind, job.run_id, self.now)
            result = PrepareResult(
                sha("proxy_base"), sha("adapter"), sha("llm_adapter"), sha("probe_set"), TENSORS, {"validation": {}}
            )
        results.finish_prepare(session, job, owner, result, self.now)

    def job_id(self, kind: JobKind, subject_id: str) -> str:
        with self.database.reading() as session:
            found = session.scalar(select(JobRow.id).where(JobRow.kind == kind, JobRow.subject_id == subject_id))
        assert found is not None
        return found

    def job_status(self, job_id: str) -> JobStatus:
        with self.database.reading() as session:
            return session.get_one(JobRow, job_id).status

    def claim(self, job_id: str, owner: str = "worker", lease_seconds: float = 20) -> JobRecord | None:
        return self.call(jobs.claim, job_id, owner, lease_seconds, self.now)

    def claim_newest(self, owner: str = "worker") -> JobRecord:
        job = self.claim(self.sent[-1], owner)
        assert job is not None
        return job

    def poll(self, device_id: str) -> Assignment | None:
        return self.call(assignments.next_assignment, device_id, self.now, LIMITS)

    def take(self, device_id: str) -> Assignment:
        assignment = self.poll(device_id)
        assert assignment is not None
        return assignment

    def report(
        self, assignment: Assignment, device_id: str, status: AssignmentStatus, **values: Any
    ) -> AssignmentStatus:
        progress = AssignmentProgress.model_validate({"status": status, **values})
        return self.call(assignments.report_progress, device_id, assignment.assignment_id, progress, self.now).status

    def upload(self, assignment: Assignment, device_id: str, content: str = "") -> None:
        for part in parts_of(assignment, content or device_id):
            arguments = (device_id, assignment.assignment_id, part.kind, part.sha256, part.size_bytes, self.now)
            self.call(updates.record_part, *arguments)

    def submit(self, assignment: Assignment, device_id: str, content: str = "") -> SubmissionReceipt:
        submission = submission_of(assignment, content or device_id)
        return self.call(updates.submit, device_id, assignment.assignment_id, submission, self.now)

    def deliver(self, device_id: str) -> Assignment:
        """Take, upload and submit."""
        assignment = self.take(device_id)
        self.upload(assignment, device_id)
        self.submit(assignment, device_id)
        return assignment

    def aggregate(self, owner: str = "worker", *, counted: Sequence[str] | None = None) -> JobRecord:
        job = self.claim_newest(owner)
        self.call(self.finish_aggregation, job, owner, counted=counted)
        return job

    def finish_aggregation(
        self, session: Session, job: JobRecord, owner: str, *, counted: Sequence[str] | None = None
    ) -> None:
        if counted is None:
            counted = [update.assignment_id for update in updates.submitted_updates(session, job.round_id or "")]
        adapter = self._adapter(session, job, "aggregate", "adapter")
        state = self._adapter(session, job, "optimizer", "server_optimizer")
        metrics = {"num_updates": len(counted)}
        results.finish_aggregation(
            session, job, owner, adapter, counted, metrics, self.now, server_optimizer_sha256=state
        )

    def finish_co_tuning(self, session: Session, job: JobRecord, owner: str) -> None:
        adapter = self._adapter(session, job, "candidate", "adapter")
        llm_adapter = self._adapter(session, job, "candidate llm", "llm_adapter")
        message = self._adapter(session, job, "message", "llm_logits")
        state = self._adapter(session, job, "state", "server_state")
        candidate = results.Candidate(adapter, llm_adapter, message, state)
        results.finish_co_tuning(session, job, owner, candidate, {"losses": {"llm": 1.5}}, self.now)

    def finish_evaluation(self, session: Session, job: JobRecord, owner: str, *, promoted: bool = True) -> None:
        results.finish_evaluation(session, job, owner, {"validation": {"llm": 3.0}}, promoted, self.now)

    def finish_round(self, *, promoted: bool = True) -> None:
        """Aggregate, co-tune and evaluate the round that has just closed."""
        self.aggregate()
        self.call(self.finish_co_tuning, self.claim_newest(), "worker")
        self.call(self.finish_evaluation, self.claim_newest(), "worker", promoted=promoted)

    def _adapter(self, session: Session, job: JobRecord, stage: str, kind: str) -> str | None:
        context = rounds.get_context(session, job.round_id or "")
        if context.config.strategy.name == "standalone":
            return None
        content = sha(f"{stage} {context.number}")
        artifacts.register(session, content, 100, kind, job.run_id, self.now)
        return content

    def run(self, run_id: str) -> Run:
        with self.database.reading() as session:
            return runs.get_run(session, run_id)

    def round(self, run_id: str, number: int = 1) -> Round:
        with self.database.reading() as session:
            return rounds.get_round(session, run_id, number)

    def statuses(self, run_id: str, number: int = 1) -> dict[str, AssignmentStatus]:
        return {device.device_name: device.status for device in self.round(run_id, number).devices}

    def events(self, run_id: str | None = None) -> list[Event]:
        with self.database.reading() as session:
            return events.list_events(session, run_id=run_id, after=0, limit=10_000)

    def snapshot(self) -> dict[str, list[tuple[Any, ...]]]:
        """Every row of every table but the event feed."""
        with self.database.reading() as session:
            return {
                table.name: sorted((tuple(row) for row in session.execute(select(table))), key=repr)
                for table in Table.metadata.sorted_tables
                if table.name != "events"
            }

    def count(self, table: type[Table]) -> int:
        with self.database.reading() as session:
            return session.scalar(select(func.count()).select_from(table)) or 0

    def age_round(self, assignment: Assignment, device_id: str) -> None:
        """Close a round behind a device's back, as the sweep does after its deadline."""
        with self.database.reading() as session:
            row = session.get_one(AssignmentRow, assignment.assignment_id)
            deadline = session.get_one(RoundRow, row.round_id).deadline_at
        self.now = max(self.now, deadline)
        self.call(rounds.close_due_rounds, self.now)

    def race(self, actions: Sequence[Callable[[], Any]]) -> list[Any]:
        """Do all at the same moment, a thread and a connection each; return results or the exceptions."""
        start = Barrier(len(actions))

        def run(action: Callable[[], Any]) -> Any:
            start.wait()
            try:
                return action()
            except Exception as error:  # The caller looks at each.
                return error

        with ThreadPoolExecutor(len(actions)) as pool:
            return list(pool.map(run, actions))


def parts_of(assignment: Assignment, content: str) -> list[Part]:
    return [Part(kind=kind, sha256=sha(f"{kind} {content}"), size_bytes=10) for kind in assignment.uploads]


def submission_of(assignment: Assignment, content: str, num_examples: int = 40) -> Submission:
    return Submission(
        base_sha256=assignment.adapter.sha256 if assignment.adapter else None,
        num_examples=num_examples,
        parts=parts_of(assignment, content),
        metrics=DeviceMetrics(losses={"slm": 2.5}),
    )
