"""A run's events as server-sent events (HTML standard, section 9.2).

The stream ends when the run is over and everything was sent, or when the process stops; the client comes back with
`Last-Event-ID` and misses nothing. Between events it holds neither a thread nor a database connection.
"""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from sqlalchemy.orm import Session

from cloud_api.cloud import Cloud
from cloud_api.feed import run_topic
from persistence import events, runs
from persistence.transitions import UNFINISHED_RUN
from protocol.errors import DomainError
from protocol.events import Event

PAGE = 200
RETRY_MILLISECONDS = 2000


@dataclass(frozen=True)
class Look:
    """What came after a sequence, and whether the run was already over before we looked."""

    over: bool
    events: list[Event]

    @property
    def finished(self) -> bool:
        """Whether nothing is left to send, now or later."""
        return self.over and not self.events


def look(session: Session, run_id: str, after: int) -> Look:
    """Read the next events. The status is read first: what ended the run is then among the events.

    Raises:
        DomainError: RUN_NOT_FOUND.
    """
    over = runs.get_run(session, run_id).status not in UNFINISHED_RUN
    return Look(over, events.list_events(session, run_id=run_id, after=after, limit=PAGE))


async def stream(
    cloud: Cloud, run_id: str, after: int, authenticate: Callable[[Session], object]
) -> AsyncIterator[str]:
    """Yield the stream's text from the event after sequence `after` on.

    Args:
        authenticate: raises DomainError once the caller may not read on: its key was revoked or expired. Asked each
            time that something happens, and with each sign of life.
    """

    def see(session: Session) -> Look:
        authenticate(session)
        return look(session, run_id, after)

    yield f"retry: {RETRY_MILLISECONDS}\n\n"
    with cloud.feed.subscribe(run_topic(run_id)) as waiter:
        while not waiter.stopping:
            try:
                now = await cloud.read(see)
            except DomainError:  # The answer has begun; who comes back is told why.
                return
            if now.finished:
                return
            for event in now.events:
                yield encode(event)
                after = event.sequence
            if not now.events and not await waiter.wait(cloud.settings.stream_heartbeat_seconds):
                yield ": alive\n\n"


def encode(event: Event) -> str:
    """Return one event as text. JSON has no line breaks, so that one `data` line is enough."""
    return f"id: {event.sequence}\nevent: {event.type.value}\ndata: {event.model_dump_json()}\n\n"
