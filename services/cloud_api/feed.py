"""Wakes whoever waits in this process, when something was committed by any process.

One task looks at what is new in the event table, at once when this process added something to it and every
`interval_seconds` in any case, since the worker is another process. So the cost of waiting does not depend on how many
wait: 10,000 devices in a long poll cost the database four small queries a second. A wake-up is a hint; who is woken
looks at the database again.

No wake-up is lost: a waiter subscribes before it looks, and the feed's position is never ahead of what a look can see.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Sequence

import structlog

from cloud_api.assignments.board import WorkBoard
from protocol.errors import DomainError
from protocol.events import Event, EventType
from protocol.statuses import AssignmentStatus, RunStatus

log = structlog.get_logger(__name__)

WORK = "work"
"""Topic: a device that had nothing to do may have something now."""

SHORTEST_INTERVAL_SECONDS = 0.02
"""Commits of this process within this time are looked at together."""

PAUSE_AFTER_FAILURE_SECONDS = 1.0

_FREES_A_PLACE = {AssignmentStatus.REJECTED.value, AssignmentStatus.LATE.value, AssignmentStatus.LOST.value}


def run_topic(run_id: str) -> str:
    """Return the topic of everything that happens in a run."""
    return f"run:{run_id}"


def topics(event: Event) -> Iterator[str]:
    """Yield the topics whose waiters an event concerns."""
    if event.run_id is not None:
        yield run_topic(event.run_id)
    match event.type:
        case EventType.ROUND_OPENED:
            yield WORK
        case EventType.RUN_STATUS_CHANGED if event.data.get("to") == RunStatus.RUNNING.value:
            yield WORK
        case EventType.ASSIGNMENT_STATUS_CHANGED if event.data.get("to") in _FREES_A_PLACE:
            yield WORK
        case EventType.DEVICE_STATUS_CHANGED | EventType.FEDERATION_DEVICE_ADDED:
            yield WORK


class Waiter:
    """One that waits for a topic. Made by `Feed.subscribe`.

    Attributes:
        is_concerned: asked before news wake this one, if it is set: to wake 10,000 devices for a round of 100 took the
            event loop three seconds.
    """

    def __init__(self, feed: "Feed") -> None:
        self._feed = feed
        self.woken = asyncio.Event()
        self.is_concerned: Callable[[], bool] | None = None

    @property
    def stopping(self) -> bool:
        """Whether the process ends, so that waiting must too."""
        return self._feed.stopping

    async def wait(self, seconds: float) -> bool:
        """Wait until the topic has news or the process stops; False if `seconds` passed without."""
        try:
            async with asyncio.timeout(seconds):
                await self.woken.wait()
        except TimeoutError:
            return False
        self.woken.clear()
        return True


class Feed:
    """Follows the event table while the process runs.

    Args:
        newest: returns the newest sequence of the table.
        after: returns the events after a sequence, oldest first; a bounded number of them.
        board: is told of them before anybody is woken.
    """

    def __init__(
        self,
        newest: Callable[[], Awaitable[int]],
        after: Callable[[int], Awaitable[Sequence[Event]]],
        *,
        board: WorkBoard,
        interval_seconds: float,
    ) -> None:
        self._board = board
        self._newest = newest
        self._after = after
        self._interval_seconds = interval_seconds
        self._waiters: dict[str, set[Waiter]] = {}
        self._nudged = asyncio.Event()
        self.stopping = False

    @contextlib.contextmanager
    def subscribe(self, topic: str) -> Iterator[Waiter]:
        """Be woken by what happens under `topic` from now on."""
        waiter = Waiter(self)
        if self.stopping:
            waiter.woken.set()
        waiters = self._waiters.setdefault(topic, set())
        waiters.add(waiter)
        try:
            yield waiter
        finally:
            waiters.discard(waiter)
            if not waiters and self._waiters.get(topic) is waiters:
                del self._waiters[topic]

    def nudge(self) -> None:
        """Look soon: this process has added events."""
        self._nudged.set()

    def stop(self) -> None:
        """Wake everybody for good: the process ends."""
        self.stopping = True
        self._nudged.set()
        for waiters in self._waiters.values():
            for waiter in waiters:
                waiter.woken.set()

    async def follow(self) -> None:
        """Follow the table until `stop`. A database that does not answer is tried again."""
        position: int | None = None
        failing = False
        while not self.stopping:
            try:
                position = await (self._start() if position is None else self._advance(position))
                failing = False
            except Exception as error:  # the top of a loop that must not end: nobody would be woken any more
                if not failing:
                    log.warning("feed_failed", reason=str(error), exc_info=not isinstance(error, DomainError))
                failing = True
                self._board.lose()
            await self._pause(PAUSE_AFTER_FAILURE_SECONDS if failing else self._interval_seconds)

    async def _start(self) -> int:
        position = await self._newest()
        await self._board.advance((), offers_work=True)
        # Who subscribed before this may have looked before the newest event.
        for topic in list(self._waiters):
            self._wake(topic)
        return position

    async def _advance(self, position: int) -> int:
        events = await self._after(position)
        concerned = {topic for event in events for topic in topics(event)}
        await self._board.advance(events, offers_work=WORK in concerned)
        for topic in concerned:
            self._wake(topic)
        return events[-1].sequence if events else position

    async def _pause(self, seconds: float) -> None:
        await asyncio.sleep(SHORTEST_INTERVAL_SECONDS)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._nudged.wait()
        self._nudged.clear()

    def _wake(self, topic: str) -> None:
        for waiter in self._waiters.get(topic, ()):
            if waiter.is_concerned is None or waiter.is_concerned():
                waiter.woken.set()
