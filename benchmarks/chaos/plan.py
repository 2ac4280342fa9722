"""Which faults there will be, when each is due, and what became of it.

A fault waits for its moment: a transition in the event table, a request on its way, or a point in time. The order in
which those of one moment come is drawn from the seed.
"""

import random
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from benchmarks.chaos.cloud import API, BROKER, CONTROLLER, DATABASE, WORKER
from benchmarks.chaos.network import REQUEST_KINDS, Request, Tamper
from benchmarks.chaos.scenarios import Move
from protocol.events import Event, EventType

RUN_MOMENTS = ("run created", "run preparing", "run running", "run completed")
ROUND_MOMENTS = (
    *("assignment accepted", "round collecting", "assignment training", "assignment uploading"),
    *("assignment submitted", "round aggregating", "aggregate_round claimed", "round co_tuning"),
    *("co_tune_round claimed", "round evaluating", "evaluate_round claimed", "round published"),
)
MOMENTS = (*RUN_MOMENTS, *ROUND_MOMENTS)
MOVE_MOMENTS = ("run paused", "run resumed", "run retried", "run rolled back", "run stopped", "round abandoned")
LATE_TAKEN = "late updates taken"
LATE_CLAIMED = "late updates' aggregation claimed"
LATE_MOMENTS = ("update late", LATE_TAKEN, LATE_CLAIMED)
RARE_MOMENTS = frozenset((*RUN_MOMENTS, *MOVE_MOMENTS, *LATE_MOMENTS))
"""These are struck at however short ago something else was."""

CHUNK_REQUESTS = ("upload begun", "chunk")  # the last chunk completes the file
IN_FLIGHT = ("poll", "progress", "part", *CHUNK_REQUESTS, "submission")
FULL = "full"
KILL = "kill -9"
ANY_TIME = "at random"


@dataclass
class Fault:
    """One fault."""

    kind: str
    moment: str
    target: str = ""
    done: bool = False
    where: str = ""
    """Run and round in which it happened."""
    broken: bool = False
    """Whether an invariant did not hold afterwards."""

    @property
    def name(self) -> str:
        """As the matrix shows it."""
        return f"{self.kind} {self.target}".strip()


@dataclass
class Plan:
    """The faults that are still to come, and those that were. Thread-safe."""

    faults: list[Fault] = field(default_factory=list)
    active: bool = False
    where: str = ""

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    @property
    def waiting(self) -> list[Fault]:
        """Those that have not happened."""
        with self._lock:
            return [fault for fault in self.faults if not fault.done]

    @property
    def happened(self) -> list[Fault]:
        """Those that have."""
        with self._lock:
            return [fault for fault in self.faults if fault.done]

    def due(self, moment: str, kinds: Iterable[str] | None = None) -> Fault | None:
        """Return the next fault of a moment, if there is one and faults are wanted now. `happens` follows, or not."""
        with self._lock:
            if not self.active:
                return None
            allowed = set(kinds) if kinds is not None else None
            for fault in self.faults:
                if not fault.done and fault.moment == moment and (allowed is None or fault.kind in allowed):
                    return fault
        return None

    def happens(self, fault: Fault) -> None:
        """Note that a fault happens now."""
        with self._lock:
            fault.done, fault.where = True, self.where

    def tamper(self, request: Request) -> Tamper | None:
        """Say what becomes of a request; that counts as done."""
        fault = self.due(f"{request.kind} request", [tamper.value for tamper in Tamper])
        if fault is None:
            return None
        self.happens(fault)
        return Tamper(fault.kind)


_NAMED = {
    EventType.RUN_CREATED: "run created",
    EventType.RUN_ROLLED_BACK: "run rolled back",
    EventType.ROUND_OPENED: "round opened",
}
_AGAIN = {"paused": "run resumed", "failed": "run retried"}


def moment_of(event: Event) -> str | None:
    """Name the transition that an event tells of; None for those at which nothing is planned."""
    match event.type:
        case EventType.UPDATE_SUBMITTED if event.data["late"]:
            return "update late"
        case EventType.RUN_STATUS_CHANGED | EventType.ROUND_STATUS_CHANGED | EventType.ASSIGNMENT_STATUS_CHANGED:
            moved = f"{event.type.value.partition('.')[0]} {event.data['to']}"
            return _AGAIN.get(event.data["from"], moved) if moved == "run running" else moved
        case EventType.JOB_CLAIMED:
            return f"{event.data['kind']} claimed"
    return _NAMED.get(event.type)


class Moments:
    """Names moments as `moment_of`, and of a round that uses late updates, those of its aggregation otherwise."""

    def __init__(self) -> None:
        self._with_late: set[str | None] = set()

    def of(self, event: Event) -> str | None:
        """Name the moment of an event, which comes after all before it."""
        moment = moment_of(event)
        if moment == "round aggregating" and " late one" in str(event.data["reason"]):
            self._with_late.add(event.round_id)
            return LATE_TAKEN
        if moment == "aggregate_round claimed" and event.round_id in self._with_late:
            return LATE_CLAIMED
        return moment


def kills(targets: Sequence[str]) -> list[Fault]:
    """kill -9 of each target at each transition."""
    return [Fault(KILL, moment, target) for moment in MOMENTS for target in targets]


def kills_of_moves(targets: Sequence[str], in_flight: Sequence[str]) -> list[Fault]:
    """kill -9 of each target at what operators and late devices do; of those in flight, while a move is asked for."""
    moments = (*MOVE_MOMENTS, *LATE_MOMENTS)
    faults = [Fault(KILL, moment, target) for moment in moments for target in targets]
    return faults + [Fault(KILL, f"{move.value} in flight", target) for move in Move for target in in_flight]


def kills_in_flight(targets: Sequence[str]) -> list[Fault]:
    """kill -9 of each target some milliseconds after a request has been sent."""
    return [Fault(KILL, f"{kind} in flight", target) for kind in IN_FLIGHT for target in targets]


def spoilt_requests(times: int) -> list[Fault]:
    """Each way to spoil a request on each kind of request, so many times."""
    return [Fault(tamper.value, f"{kind} request") for _ in range(times) for tamper in Tamper for kind in REQUEST_KINDS]


def hardships() -> list[Fault]:
    """What befalls the worker that has a job: it stands still for longer than its lease, or runs out of memory."""
    stages = [moment for moment in ROUND_MOMENTS if moment.endswith("claimed")]
    kinds = ("suspended past its lease", "out of memory")
    return [Fault(kind, stage, WORKER) for _ in range(2) for kind in kinds for stage in stages]


def full_disk_plan(seed: int) -> Plan:
    """The disk of the whole service is full for a while, at every transition of a round and while files come."""
    moments = (*ROUND_MOMENTS, *(f"{kind} in flight" for kind in ("part", *CHUNK_REQUESTS)))
    return _shuffled([Fault(FULL, moment, "disk") for moment in moments], seed)


def served_plan(seed: int) -> Plan:
    """For PostgreSQL and Redis."""
    faults = kills([API, WORKER, CONTROLLER, DATABASE, BROKER]) + hardships()
    faults += kills_in_flight([API, DATABASE, "device"])
    faults += [Fault("one connection's process killed", ANY_TIME, DATABASE) for _ in range(4)]
    faults += [Fault("flushed", ANY_TIME, BROKER) for _ in range(8)]
    faults += [Fault(KILL, ANY_TIME, target) for target in (API, WORKER, CONTROLLER, DATABASE, BROKER) for _ in "12"]
    return _shuffled(faults + spoilt_requests(1), seed)


def served_moves_plan(seed: int) -> Plan:
    """For PostgreSQL and Redis, while operators move runs and updates come late."""
    return _shuffled(kills_of_moves([API, WORKER, CONTROLLER, DATABASE, BROKER], [API, DATABASE]), seed)


def embedded_moves_plan(seed: int) -> Plan:
    """For SQLite, likewise."""
    return _shuffled(kills_of_moves([API, WORKER, CONTROLLER], [API]), seed)


def embedded_plan(seed: int) -> Plan:
    """For SQLite and the broker that is a folder, which have no process."""
    faults = kills([API, WORKER, CONTROLLER]) + kills_in_flight([API, "device"])
    faults += [Fault("messages removed", ANY_TIME, BROKER) for _ in range(4)]
    faults += [Fault(KILL, ANY_TIME, target) for target in (API, WORKER, CONTROLLER) for _ in "12"]
    return _shuffled(faults + spoilt_requests(1), seed)


def _shuffled(faults: list[Fault], seed: int) -> Plan:
    random.Random(seed).shuffle(faults)
    return Plan(faults)
