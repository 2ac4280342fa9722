"""The long poll: a device asks for work and is answered when there is some, or when its patience ends.

While it waits it holds neither a thread nor a database connection; `cloud_api.feed` wakes it.
"""

import asyncio
from collections.abc import Awaitable, Callable

from sqlalchemy.orm import Session

from cloud_api.authentication import Presented, authenticate_device
from cloud_api.cloud import Cloud
from cloud_api.feed import WORK
from persistence import assignments, traffic
from protocol.assignments import Assignment


async def wait_for_assignment(
    cloud: Cloud,
    presented: Presented,
    wait_seconds: float,
    is_gone: Callable[[], Awaitable[bool]],
) -> Assignment | None:
    """Return the device's assignment, or None after `wait_seconds` without one.

    Args:
        is_gone: whether the device has hung up; then nothing is offered to it.

    Raises:
        DomainError: the credential is not valid (also: no longer), or the device may not work.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + wait_seconds
    with cloud.feed.subscribe(WORK) as waiter:
        # Not `cloud.write`: a poll tells the feed nothing, and there may be a thousand a second.
        device_id, assignment = await cloud.transactions.write(lambda session: _ask(session, cloud, presented))
        while assignment is None and not waiter.stopping:
            left = deadline - loop.time()
            if left <= 0 or not await waiter.wait(left) or await is_gone():
                return None
            # Many devices wake for one place: look before locking anything.
            if await cloud.read(lambda session: assignments.work_waits(session, device_id, cloud.now())):
                _, assignment = await cloud.transactions.write(lambda session: _ask(session, cloud, presented))
        return assignment


def _ask(session: Session, cloud: Cloud, presented: Presented) -> tuple[str, Assignment | None]:
    device_id = authenticate_device(session, cloud, presented)
    limits = cloud.settings.upload_limits
    assignment = assignments.next_assignment(session, device_id, cloud.now(), limits)
    if assignment is not None:
        num_bytes = len(assignment.model_dump_json().encode())
        traffic.add(session, assignment.run_id, device_id, "down", "assignment", num_bytes)
    return device_id, assignment
