"""The long poll: a device asks for work and is answered when there is some, or when its patience ends.

While it waits it holds neither a thread nor a database connection; `cloud_api.feed` wakes it.
"""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

from sqlalchemy.orm import Session

from cloud_api.authentication import Presented, identify_device, prove_again
from cloud_api.cloud import Cloud
from cloud_api.feed import WORK
from cloud_api.threads import in_thread
from persistence import assignments, traffic
from persistence.enrolment import DeviceIdentity


async def wait_for_assignment(
    cloud: Cloud,
    presented: Presented,
    wait_seconds: float,
    is_gone: Callable[[], Awaitable[bool]],
) -> bytes | None:
    """Return the device's assignment as JSON, or None after `wait_seconds` without one.

    Args:
        is_gone: whether the device has hung up; then nothing is offered to it.

    Raises:
        DomainError: the credential is not valid (also: no longer), or the device may not work.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + wait_seconds
    with cloud.feed.subscribe(WORK) as waiter:
        device_id, assignment = await _recognised(cloud, presented), None
        if device_id is None:
            device_id, assignment = await _asked(cloud, presented)
        waiter.is_concerned = partial(_may_have_work, cloud, device_id)
        while assignment is None and not waiter.stopping:
            left = deadline - loop.time()
            if left <= 0:
                return None
            with cloud.request_metrics.waiting_devices.track_inprogress():
                woken = await waiter.wait(left)
            if not woken or await is_gone():
                return None
            # Many devices may wake for one place: look before locking anything, and at the board before that.
            if not _may_have_work(cloud, device_id):
                continue
            if await cloud.read(lambda session: assignments.work_waits(session, device_id, cloud.now())):
                _, assignment = await _asked(cloud, presented)
        return assignment


def _may_have_work(cloud: Cloud, device_id: str) -> bool:
    return not cloud.board.has_nothing_for(device_id)


async def _recognised(cloud: Cloud, presented: Presented) -> str | None:
    """Return the device's id if it is known here and there surely is nothing for it; else the database has to say."""
    identity = cloud.board.recall(presented.bearer)
    if identity is None or not cloud.board.has_nothing_for(identity.device_id):
        return None
    if cloud.limits.waits:
        await in_thread(prove_again, cloud, presented, identity)
    else:
        prove_again(cloud, presented, identity)
    cloud.board.saw(identity.device_id)
    return identity.device_id


async def _asked(cloud: Cloud, presented: Presented) -> tuple[str, bytes | None]:
    identity, assignment = await cloud.write(lambda session: _ask(session, cloud, presented))
    assert presented.bearer is not None
    cloud.board.remember(presented.bearer, identity)
    return identity.device_id, assignment


def _ask(session: Session, cloud: Cloud, presented: Presented) -> tuple[DeviceIdentity, bytes | None]:
    identity = identify_device(session, cloud, presented)
    limits = cloud.settings.upload_limits
    assignment = assignments.next_assignment(session, identity.device_id, cloud.now(), limits)
    if assignment is None:
        return identity, None
    content = assignment.model_dump_json().encode()
    traffic.add(session, assignment.run_id, identity.device_id, "down", "assignment", len(content))
    return identity, content
