"""The Celery tasks: shells around the stages.

A task gets a job id and nothing else. It claims the job by lease (None: done, taken or withdrawn; nothing to
do), runs the stage, and commits the stage's result together with the end of the job in one transaction. A second
delivery of the same message therefore finds nothing to do. Torch is imported when the first training task runs.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, assert_never

import celery
import structlog

import tracing
from persistence import jobs
from persistence.blobs import BlobStore
from persistence.clock import database_now
from persistence.database import Database
from persistence.errors import LeaseLost
from persistence.jobs import JobRecord
from protocol.errors import DomainError, ErrorCode
from protocol.statuses import JobKind
from worker.leases import Abandoned, Lease, Silence
from worker.settings import Settings
from worker.stage import Finish, Stage, Work
from worker.stalls import where_it_stands

if TYPE_CHECKING:
    from worker.model_cache import ModelCache

PASSING = frozenset({ErrorCode.UNAVAILABLE})
"""What a later attempt may not meet again: the database or the disk does not answer."""

DAMAGING = (ImportError, MemoryError, SystemError)
"""What leaves a process unfit for the next job: an import that ran out of memory halfway fails ever after."""

WAIT_SECONDS = (0.5, 1.0, 2.0, 4.0)
"""Between two tries to write a result."""

log = structlog.get_logger("worker.tasks")


@dataclass
class JobRunner:
    """Runs jobs in this process, one at a time."""

    settings: Settings
    database: Database
    blobs: BlobStore
    owner: str
    """Names this process in leases; unique for each start of a process."""
    stop: threading.Event = field(default_factory=threading.Event)
    on_damage: Callable[[], None] = lambda: None
    """Called after a job that ended with one of `DAMAGING`; the process should be replaced."""
    on_stall: Callable[[], None] = lambda: None
    """Called, in another thread, when a stage shows no progress for too long; the process should end at once."""
    promise: Callable[[float], None] = lambda seconds: None
    """See `leases.Silence`."""

    @cached_property
    def _cache(self) -> "ModelCache":
        import torch
        from transformers.utils.logging import disable_progress_bar

        from worker.model_cache import ModelCache

        disable_progress_bar()  # a log is no terminal
        if self.settings.torch_threads is not None:
            torch.set_num_threads(self.settings.torch_threads)
        return ModelCache(self.settings.home / "models", self.blobs)

    def run(self, job_id: str) -> None:
        """Do a job if there is anything to do. Returns normally whatever became of it: the database says what."""
        if self.stop.is_set():
            return
        try:
            with self.database.transaction() as session:
                job = jobs.claim(session, job_id, self.owner, self.settings.lease_seconds, database_now(session))
        except DomainError as error:
            log.warning("job_not_claimed", job_id=job_id, reason=error.detail)
            return
        if job is None:
            log.info("nothing_to_do", job_id=job_id)
            return
        ids = {"job_id": job.job_id, "run_id": job.run_id, "round_id": job.round_id}
        with (
            structlog.contextvars.bound_contextvars(**ids),
            tracing.span(job.kind.value, parent=job.traceparent, **ids, worker=self.owner),
        ):
            log.info("job_started", kind=job.kind.value, attempt=job.attempts)
            self._attempt(job)

    def _attempt(self, job: JobRecord) -> None:
        try:
            with self._lease(job) as lease:
                with lease.long_call("importing torch"):
                    stage, work = load_stage(job.kind), self._work(job, lease)
                finish = stage(work)
                lease.check()
                write_result(self.database, finish, lease, self.stop)
            log.info("job_done", kind=job.kind.value)
        except (Abandoned, LeaseLost) as reason:
            log.warning("job_abandoned", kind=job.kind.value, reason=str(reason))
            if self.stop.is_set():
                self._give_back(job)
        except DomainError as error:
            log.warning("job_failed", kind=job.kind.value, code=error.code.value, reason=error.detail)
            self._fail(job, error.code, error.detail, retry=error.code in PASSING)
        except Exception as error:  # the top of a job: whatever it is, the run must learn of it
            log.exception("job_crashed", kind=job.kind.value)
            self._fail(job, ErrorCode.JOB_FAILED, f"{job.kind.value}: {type(error).__name__}: {error}", retry=True)
            if isinstance(error, DAMAGING):
                self.on_damage()

    def _work(self, job: JobRecord, lease: Lease) -> Work:
        return Work(
            job=job,
            owner=self.owner,
            database=self.database,
            blobs=self.blobs,
            cache=self._cache,
            lease=lease,
            checkpoints=self.settings.home / "checkpoints",
        )

    def _lease(self, job: JobRecord) -> Lease:
        silence = Silence(
            step_seconds=self.settings.stall_seconds,
            long_call_seconds=self.settings.long_call_seconds,
            on_stall=lambda reason: self._stalled(job, reason),
            promise=self.promise,
        )
        return Lease(lambda: self._renew(job), self.settings.lease_seconds, self.stop, silence)

    def _stalled(self, job: JobRecord, reason: str) -> None:
        """Give back the job of a stage that stands still, and have the process ended, whatever that meets."""
        try:
            log.error("stage_stalled", kind=job.kind.value, job_id=job.job_id, reason=reason, stack=where_it_stands())
            said = f"{job.kind.value} stood still in worker {self.owner}: {reason}"
            self._fail(job, ErrorCode.JOB_FAILED, said, retry=True)
        finally:
            self.on_stall()

    def _renew(self, job: JobRecord) -> bool:
        with self.database.transaction() as session:
            return jobs.renew(session, job.job_id, self.owner, self.settings.lease_seconds, database_now(session))

    def _give_back(self, job: JobRecord) -> None:
        try:
            with self.database.transaction() as session:
                jobs.release(session, job.job_id, self.owner, "the worker was stopped", database_now(session))
        except DomainError as error:  # the lease runs out by itself
            log.warning("job_not_given_back", kind=job.kind.value, reason=str(error))

    def _fail(self, job: JobRecord, code: ErrorCode, reason: str, *, retry: bool) -> None:
        try:
            with self.database.transaction() as session:
                jobs.fail(session, job.job_id, self.owner, code, reason, database_now(session), retry=retry)
        except DomainError as error:  # the lease runs out by itself
            log.warning("failure_not_written", kind=job.kind.value, reason=error.detail)


def write_result(database: Database, finish: Finish, lease: Lease, stop: threading.Event) -> None:
    """Commit a stage's result. Minutes of work are behind it, so a database that is away is waited for.

    Raises:
        DomainError: UNAVAILABLE, it stayed away; LeaseLost, the job is another worker's, or was committed by a try
            whose answer was lost.
        Abandoned: from the lease.
    """
    for wait_seconds in (*WAIT_SECONDS, None):
        try:
            with database.transaction() as session:
                finish(session)
            return
        except DomainError as error:
            if error.code not in PASSING or wait_seconds is None:
                raise
            log.warning("result_not_written", reason=error.detail, wait_seconds=wait_seconds)
        stop.wait(wait_seconds)
        lease.check()


def load_stage(kind: JobKind) -> Stage:
    """Return the function that does jobs of this kind. Imports torch."""
    from worker import aggregation, co_tuning, evaluation, preparation

    match kind:
        case JobKind.PREPARE_RUN:
            return preparation.prepare
        case JobKind.AGGREGATE_ROUND:
            return aggregation.aggregate
        case JobKind.CO_TUNE_ROUND:
            return co_tuning.co_tune
        case JobKind.EVALUATE_ROUND:
            return evaluation.evaluate_round
    assert_never(kind)


def register_jobs(app: celery.Celery, runner: JobRunner) -> None:
    """Make the four training tasks known to `app`, by name."""

    def run_job(job_id: str) -> None:
        runner.run(job_id)

    for kind in JobKind:
        app.task(run_job, name=kind.task_name, acks_late=True, ignore_result=True)
