"""Asks the database whether a part may come: without a lock where nothing has to be decided under one."""

from collections.abc import Callable
from typing import TypeVar

from sqlalchemy.orm import Session

from cloud_api.authentication import Presented, authenticate_device, recognise_device
from cloud_api.cloud import Cloud
from persistence import updates
from persistence.updates import PartAdmission
from protocol.statuses import PartKind

Result = TypeVar("Result")


async def admitted(
    cloud: Cloud,
    presented: Presented,
    assignment_id: str,
    kind: PartKind,
    look: Callable[[Session, PartAdmission], Result],
) -> tuple[PartAdmission, Result]:
    """Have a part admitted, and `look` at what is there, in the same session.

    A round that is open as it was a moment ago needs no transaction that writes; what comes too late does, since it is
    remembered as late. What is decided here is decided again, under locks, when the bytes have come.

    Args:
        look: changes nothing; it may be called twice.

    Raises:
        DomainError: as `authenticate_device`, `updates.admit_part` and `look`.
    """

    def read(session: Session) -> tuple[PartAdmission, Result] | None:
        device_id = recognise_device(session, cloud, presented)
        admission = updates.look_at_part(session, device_id, assignment_id, kind, cloud.now())
        return None if admission is None else (admission, look(session, admission))

    def write(session: Session) -> tuple[PartAdmission, Result]:
        device_id = authenticate_device(session, cloud, presented)
        admission = updates.admit_part(session, device_id, assignment_id, kind, cloud.now())
        return admission, look(session, admission)

    seen: tuple[PartAdmission, Result] | None = await cloud.read(read)
    return seen if seen is not None else await cloud.write(write)
