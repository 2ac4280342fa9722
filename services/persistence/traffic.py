"""Bytes that crossed the network, counted where the server sees them."""

from typing import Literal

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from persistence.inserting import insert_into
from persistence.tables import TrafficRow
from protocol.runs import Traffic


def add(  # noqa: PLR0917
    session: Session, run_id: str, device_id: str, direction: Literal["up", "down"], kind: str, num_bytes: int
) -> None:
    """Add bytes of a body to the run's count. One statement."""
    statement = insert_into(session, TrafficRow).values(
        run_id=run_id, device_id=device_id, direction=direction, kind=kind, num_bytes=num_bytes
    )
    key = [TrafficRow.run_id, TrafficRow.device_id, TrafficRow.direction, TrafficRow.kind]
    total = TrafficRow.num_bytes + statement.excluded.num_bytes
    session.execute(statement.on_conflict_do_update(index_elements=key, set_={"num_bytes": total}))


def totals(session: Session, run_id: str) -> Traffic:
    """Return the run's bytes by direction and kind, over all devices."""
    rows = session.execute(
        select(TrafficRow.direction, TrafficRow.kind, func.sum(TrafficRow.num_bytes))
        .where(TrafficRow.run_id == run_id)
        .group_by(TrafficRow.direction, TrafficRow.kind)
        .order_by(TrafficRow.direction, TrafficRow.kind)
    )
    counted: dict[str, dict[str, int]] = {"up": {}, "down": {}}
    for direction, kind, num_bytes in rows:
        counted[direction][kind] = int(num_bytes)
    return Traffic(up=counted["up"], down=counted["down"])
