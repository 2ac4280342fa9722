"""What a device is given after its run's last round, where the strategy lets it learn from the last message once more.

No assignment of its own: the device asks with that of the last round, which it has delivered, and sends nothing.
"""

from sqlalchemy.orm import Session

from persistence import artifacts
from persistence.assignments import get_assignment, with_round
from persistence.tables import VersionRow
from protocol.assignments import Assignment
from protocol.errors import DomainError, ErrorCode
from protocol.statuses import RunStatus
from protocol.strategies import STRATEGIES

_GOES_ON = frozenset({RunStatus.RUNNING, RunStatus.PAUSED})


def last_step(session: Session, device_id: str, assignment_id: str) -> Assignment | None:
    """Return what a device needs for its step after the last round; None: the run goes on, ask again.

    It names the message of the version that the run ended with, a round number that no round has, and no uploads.

    Raises:
        DomainError: ASSIGNMENT_NOT_FOUND; ILLEGAL_TRANSITION, the strategy has no such step, the device has delivered
            nothing, the run ended otherwise than by its last round, or without a message.
    """
    run, _, row = with_round(session, device_id, assignment_id)
    learns = STRATEGIES[run.config["strategy"]["name"]].last_step
    if learns and row.update_sha256 is not None and run.status in _GOES_ON:
        return None
    files = {}
    if learns and row.update_sha256 is not None and run.status is RunStatus.COMPLETED:
        version = session.get_one(VersionRow, (run.id, run.latest_version))
        files = artifacts.references(session, [version.message_sha256])
    if not files:
        detail = f"assignment {row.id} is {row.status.value} and its run {run.status.value}; there is no step after it"
        raise DomainError(ErrorCode.ILLEGAL_TRANSITION, detail, received=run.status.value)
    given = get_assignment(session, device_id, assignment_id, {})
    return given.model_copy(
        update={
            "round_number": given.rounds + 1,
            "base_version": run.latest_version,
            "message": next(iter(files.values())),
            "uploads": [],
            "optional_uploads": [],
            "upload_limits": {},
            "evaluate_before": False,
            "evaluate_after": False,
        }
    )
