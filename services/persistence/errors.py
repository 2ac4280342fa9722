"""What can go wrong here.

DomainError (protocol)
├── IllegalTransition      a status may not follow another, or somebody else moved the row first
├── LeaseLost              a worker finishes a job that is no longer its own
└── CommittedRefusal       a refusal whose transaction is kept
    └── RoundClosed        the update came too late, and the assignment now says so
StorageError               the blob store, or the database's address, cannot be used at all
"""

from typing import Any

from protocol.errors import DomainError, ErrorCode


class IllegalTransition(DomainError):
    """A status may not follow another one."""

    def __init__(self, subject: str, current: str, to: str, allowed: list[str]) -> None:
        expected = ", ".join(allowed) or "nothing: it is final"
        detail = f"{subject} is {current} and cannot become {to}; it can become: {expected}"
        super().__init__(ErrorCode.ILLEGAL_TRANSITION, detail, expected=allowed, received=to)
        self.current = current
        self.to = to


class LeaseLost(DomainError):
    """The job was given to another worker, or was dropped; this worker's result must not be used."""

    def __init__(self, job_id: str, owner: str, now_held_by: str) -> None:
        detail = f"job {job_id} is no longer leased to {owner}: {now_held_by}"
        super().__init__(ErrorCode.CONFLICT, detail, expected=owner, received=now_held_by)


class CommittedRefusal(DomainError):
    """A refusal that is itself worth remembering: `Database.transaction` commits, then lets it through."""


class RoundClosed(CommittedRefusal):
    """The round takes no more updates. The assignment's new status (`late`) is committed."""

    def __init__(self, detail: str, *, received: Any = None) -> None:
        super().__init__(ErrorCode.ROUND_CLOSED, detail, expected=["open", "collecting"], received=received)


class StorageError(Exception):
    """The database's address or the blob store cannot be used; the message says why."""
