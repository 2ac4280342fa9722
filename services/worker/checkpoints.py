"""States of this worker's trainings under way, so that one that was killed goes on from them when its job is claimed
again.

<folder>/<run id>/preparation/    the proxy's distillation
<folder>/<run id>/round-<n>/      co-tuning in round n

One job of a run is under way at a time; what belongs to none is removed.
"""

import hashlib
import json
import shutil
from pathlib import Path

import structlog
from sqlalchemy import event
from sqlalchemy.orm import Session

from assets.checkpoints import FolderCheckpoints
from persistence import rounds, runs
from persistence.database import Database
from protocol.errors import DomainError, ErrorCode
from protocol.statuses import RoundStatus, RunStatus
from worker.stage import Work

PREPARATION = "preparation"

log = structlog.get_logger("worker.checkpoints")


def round_place(number: int) -> str:
    """The folder of a round's states within its run's."""
    return f"round-{number}"


def open_checkpoints(work: Work, place: str, *, about: object, every: int) -> FolderCheckpoints | None:
    """Where a training's states are kept; None where none are.

    Args:
        place: `PREPARATION` or a `round_place`.
        about: JSON values that determine the training, beside what its loop sees: a state of others is never used.
        every: steps between two states; 0 keeps none.
    """
    if work.checkpoints is None or not every:
        return None
    return FolderCheckpoints(
        work.checkpoints / work.job.run_id / place,
        configuration=hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest(),
        every=every,
        on_ignored=lambda reason: log.warning("checkpoint_ignored", reason=reason),
    )


def forget_when_stored(work: Work, session: Session) -> None:
    """Remove the job's states as soon as `session` has committed its result, and not before: until then they are all
    there is."""
    if work.checkpoints is None:
        return
    folder = work.checkpoints / work.job.run_id
    event.listen(session, "after_commit", lambda _: shutil.rmtree(folder, ignore_errors=True), once=True)


def drop_outdated(work: Work) -> None:
    """Remove the states of trainings that are over without this worker: done by another one, failed or stopped.

    Raises:
        DomainError: UNAVAILABLE; nothing is known of them, so nothing more is removed.
    """
    if work.checkpoints is None or not work.checkpoints.exists():
        return
    for folder in work.checkpoints.iterdir():
        place = _place_under_way(work.database, folder.name)
        for outdated in [folder] if place is None else [each for each in folder.iterdir() if each.name != place]:
            _remove(outdated)


def _place_under_way(database: Database, run_id: str) -> str | None:
    """Where the training that a run is in has its states; None if it is in none."""
    try:
        with database.reading() as session:
            run = runs.get_run(session, run_id)
            if run.status is RunStatus.PREPARING:
                return PREPARATION
            if run.status not in (RunStatus.RUNNING, RunStatus.PAUSED) or not run.current_round:
                return None
            current = rounds.get_round(session, run_id, run.current_round)
    except DomainError as error:
        if error.code is not ErrorCode.RUN_NOT_FOUND:
            raise
        return None  # of another database
    return round_place(current.number) if current.status is RoundStatus.CO_TUNING else None


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
