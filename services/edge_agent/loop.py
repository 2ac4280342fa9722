"""The loop: cycle after cycle, waiting in between on the stop event and on nothing else."""

import time
from collections.abc import Callable

import structlog

from edge_agent.cycle import POLL_WAIT_SECONDS, Agent, Outcome, run_once
from edge_agent.errors import CloudUnavailable, Stopped
from edge_agent.run_endings import end_runs
from protocol.devices import DeviceProfile, Heartbeat

SHORTEST_POLL_SECONDS = 1.0
"""A server that answers "no work" sooner than this is not asked again at once."""

log = structlog.get_logger(__name__)


def run(agent: Agent, profile: DeviceProfile) -> None:
    """Work until the stop event is set.

    Raises:
        Stopped: as asked.
        NotAuthorised: the server does not accept this device; there is no point in going on.
    """
    agent.retrier.call("heartbeat", lambda: agent.client.heartbeat(Heartbeat(profile=profile)))
    log.info("connected")
    backoff = agent.new_backoff()
    while not agent.stop.is_set():
        started = time.monotonic()
        try:
            if agent.rotation is not None:
                agent.rotation.when_due()
            end_runs(agent)
            outcome = run_once(agent)
        except CloudUnavailable as error:
            delay_seconds = backoff.next_delay(error.retry_after_seconds)
            log.warning("cloud_unavailable", call="poll", error=str(error), retry_in_seconds=round(delay_seconds, 1))
            agent.stop.wait(delay_seconds)
            continue
        if outcome in (Outcome.REFUSED, Outcome.LATE):  # should the server offer the same again at once
            agent.stop.wait(backoff.next_delay(SHORTEST_POLL_SECONDS))
            continue
        backoff.reset()
        if outcome is Outcome.IDLE:
            agent.stop.wait(max(0.0, SHORTEST_POLL_SECONDS - (time.monotonic() - started)))
    raise Stopped


def run_until_work(
    agent: Agent,
    timeout_seconds: float,
    profile: DeviceProfile | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Outcome:
    """Do one cycle that has work in it; `Outcome.IDLE` if none came within `timeout_seconds`.

    Args:
        profile: told to the server first, so that what the owner changed holds for this assignment.

    Raises:
        CloudUnavailable: the cloud did not answer once in that time.
    """
    backoff = agent.new_backoff()
    deadline = clock() + timeout_seconds
    answered = False
    while True:
        remaining_seconds = max(deadline - clock(), 0.0)
        try:
            if profile is not None:
                agent.client.heartbeat(Heartbeat(profile=profile))
                profile = None
            end_runs(agent)
            outcome = run_once(agent, wait_seconds=min(POLL_WAIT_SECONDS, int(remaining_seconds)))
            answered = True
            delay_seconds = SHORTEST_POLL_SECONDS
        except CloudUnavailable as error:
            outcome = Outcome.IDLE
            delay_seconds = backoff.next_delay(error.retry_after_seconds)
            if clock() + delay_seconds >= deadline and not answered:
                raise
        if outcome is not Outcome.IDLE or clock() + delay_seconds >= deadline:
            return outcome
        if agent.stop.wait(delay_seconds):
            raise Stopped
