"""Does the faults of a plan: at an event, while a request is on its way, or at random."""

import contextlib
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import psycopg
import redis

from benchmarks.chaos.cloud import BROKER, DATABASE, WORKER, Cloud
from benchmarks.chaos.hardship import deny_memory, fill, suspend
from benchmarks.chaos.network import Request
from benchmarks.chaos.plan import ANY_TIME, FULL, KILL, RARE_MOMENTS, Fault, Moments, Plan
from benchmarks.chaos.scenarios import MEMBERS, Move
from benchmarks.chaos.servers import PostgresqlServer, RedisServer
from persistence.tables import JobRow
from protocol.events import Event, EventType
from protocol.federations import DEFAULT_FEDERATION
from protocol.queue import embedded_broker_url, queue_folder

PAUSE_SECONDS = 0.4
"""Between two kills: several may hit one stage, but not all of them one moment."""

MOST_ATTEMPTS = 2
"""A job that was begun so often is left in peace: the fifth failure ends its run, as it must."""

LATEST_IN_STAGE_SECONDS = 0.5
LATEST_IN_FLIGHT_SECONDS = 0.03
RANDOM_SECONDS = 2.0
"""Mean time between faults that wait for no moment."""


@dataclass
class Striker:
    """Strikes at one cloud.

    Args:
        seed: of the milliseconds that are left to chance.
    """

    cloud: Cloud
    plan: Plan
    seed: int
    _timers: list[threading.Timer] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._moments = Moments()
        self._busy_until = 0.0
        self._next_random = 0.0
        self._attempts: dict[str, int] = {}

    def on_event(self, event: Event) -> None:
        """Strike if a fault is due at this event."""
        moment = self._moments.of(event)
        self._note_attempts(event)
        if moment is None or self._in_peace():
            return
        if moment not in RARE_MOMENTS and time.monotonic() < self._busy_until:
            return
        fault = self.plan.due(moment)
        if fault is None:
            return
        if event.type is EventType.JOB_CLAIMED:  # somewhere in the stage, not always at its first instruction
            time.sleep(self._random.uniform(0, LATEST_IN_STAGE_SECONDS))
        self._happen(fault, event.data.get("job_id"))

    def at_random(self) -> None:
        """Strike if it is time for a fault that waits for no moment."""
        now = time.monotonic()
        if now < max(self._next_random, self._busy_until) or self._in_peace():
            return
        self._next_random = now + self._random.expovariate(1 / RANDOM_SECONDS)
        fault = self.plan.due(ANY_TIME)
        if fault is not None:
            self._happen(fault, None)

    def on_request(self, request: Request) -> Any:
        """Strike if a fault is due while this request is on its way; return what becomes of the request itself."""
        if self._in_flight(request.kind, [KILL, FULL]):
            return None
        return self.plan.tamper(request)

    def on_move(self, move: Move) -> None:
        """Strike if a fault is due while an operator asks for this."""
        self._in_flight(move.value, [KILL])

    def rest(self) -> None:
        """Wait for what was begun."""
        for timer in self._timers:
            timer.join()
        self._timers.clear()
        self._attempts.clear()

    def cancel(self) -> None:
        """Begin nothing more."""
        for timer in self._timers:
            timer.cancel()

    def _note_attempts(self, event: Event) -> None:
        if event.type is EventType.JOB_CLAIMED:
            self._attempts[event.data["job_id"]] = int(event.data["attempts"])
        elif event.type in (EventType.JOB_DONE, EventType.JOB_FAILED):
            self._attempts.pop(event.data["job_id"], None)

    def _in_peace(self) -> bool:
        return any(attempts > MOST_ATTEMPTS for attempts in self._attempts.values())

    def _in_flight(self, what: str, kinds: list[str]) -> bool:
        fault = self.plan.due(f"{what} in flight", kinds)
        if fault is None:
            return False
        self.plan.happens(fault)
        self._later(lambda: self._strike(fault, None))
        return True

    def _happen(self, fault: Fault, job_id: str | None) -> None:
        if self._strike(fault, job_id):
            self.plan.happens(fault)
            self._busy_until = time.monotonic() + PAUSE_SECONDS

    def _strike(self, fault: Fault, job_id: str | None) -> bool:
        """Do a fault; False if its target is down already."""
        cloud = self.cloud
        if fault.target in (DATABASE, BROKER) and cloud.served and not cloud.alive(fault.target):
            return False
        if fault.kind == KILL:
            return cloud.kill(self._victim(fault.target, job_id))
        actions: dict[str, Callable[[], object]] = {
            "one connection's process killed": lambda: self._servers()[0].kill_one_backend(),  # noqa: PLW0108 - SQLite has no server
            "flushed": lambda: self._servers()[1].flush(),  # noqa: PLW0108 - a folder neither
            "messages removed": lambda: remove_messages(cloud),
            "suspended past its lease": lambda: self._on_worker(job_id, suspend),
            "out of memory": lambda: self._on_worker(job_id, self._run_out_of_memory),
            FULL: lambda: self._later(lambda: fill(cloud.state)),
        }
        try:
            actions[fault.kind]()
        except (psycopg.OperationalError, redis.RedisError):  # it is down for another reason; this fault comes again
            return False
        return True

    def _servers(self) -> tuple[PostgresqlServer, RedisServer]:
        assert self.cloud.postgresql is not None
        assert self.cloud.redis is not None
        return self.cloud.postgresql, self.cloud.redis

    def _victim(self, target: str, job_id: str | None) -> str:
        if target == WORKER:
            return self._worker(job_id)
        return f"device-{self._random.choice(MEMBERS[DEFAULT_FEDERATION])}" if target == "device" else target

    def _worker(self, job_id: str | None) -> str:
        """Name the worker that has the job; without one, either."""
        names = [WORKER, "worker-2"]
        if job_id is not None:
            owner = self.cloud.read(lambda session: session.get_one(JobRow, job_id).owner)
            for name in names:
                if owner and owner.split(":")[-2] == str(self.cloud.process_id(name)):
                    return name
        return self._random.choice(names)

    def _on_worker(self, job_id: str | None, action: Callable[[int], None]) -> None:
        pid = self.cloud.process_id(self._worker(job_id))
        self._later(lambda: action(pid))

    def _run_out_of_memory(self, pid: int) -> None:
        """Let allocations fail for a while; then kill, as the kernel does."""
        deny_memory(pid)
        self.cloud.kill_process(pid)

    def _later(self, action: Callable[[], Any]) -> None:
        def act() -> None:
            with contextlib.suppress(ProcessLookupError):  # it died of another fault
                action()

        timer = threading.Timer(self._random.uniform(0, LATEST_IN_FLIGHT_SECONDS), act)
        timer.daemon = True
        timer.start()
        self._timers.append(timer)


def remove_messages(cloud: Cloud) -> None:
    """Lose every message of a broker that is a folder."""
    folder = queue_folder(embedded_broker_url(cloud.state))
    assert folder is not None
    for message in folder.glob("*.msg"):
        message.unlink(missing_ok=True)
