"""Bytes that crossed the network, counted where the server sees them."""

import functools
from typing import Literal

from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import Insert as PostgresqlInsert
from sqlalchemy.dialects.sqlite import Insert as SqliteInsert
from sqlalchemy.orm import Session

from persistence.inserting import dialect_of, insert_into
from persistence.tables import TrafficRow
from protocol.runs import Traffic


def add(  # noqa: PLR0917
    session: Session, run_id: str, device_id: str, direction: Literal["up", "down"], kind: str, num_bytes: int
) -> None:
    """Add bytes of a body to the run's count. One statement."""
    session.execute(
        _adding(dialect_of(session)),
        {"run_id": run_id, "device_id": device_id, "direction": direction, "kind": kind, "num_bytes": num_bytes},
    )


@functools.cache
def _adding(dialect: str) -> PostgresqlInsert | SqliteInsert:
    """Return the statement; to put it together takes longer than to execute it."""
    table = TrafficRow.__table__
    statement = insert_into(dialect, table)
    key = [table.c.run_id, table.c.device_id, table.c.direction, table.c.kind]
    total = table.c.num_bytes + statement.excluded.num_bytes
    return statement.on_conflict_do_update(index_elements=key, set_={"num_bytes": total})


def sums(session: Session, run_id: str | None = None) -> dict[tuple[str, ...], int]:
    """Return the bytes by direction and kind, over all devices; of one run, or of all."""
    query = select(TrafficRow.direction, TrafficRow.kind, func.sum(TrafficRow.num_bytes))
    if run_id is not None:
        query = query.where(TrafficRow.run_id == run_id)
    by_kind = query.group_by(TrafficRow.direction, TrafficRow.kind).order_by(TrafficRow.direction, TrafficRow.kind)
    return {(direction, kind): int(total) for direction, kind, total in session.execute(by_kind)}


def totals(session: Session, run_id: str) -> Traffic:
    """Return the run's bytes by direction and kind, over all devices."""
    counted: dict[str, dict[str, int]] = {"up": {}, "down": {}}
    for (direction, kind), num_bytes in sums(session, run_id).items():
        counted[direction][kind] = num_bytes
    return Traffic(up=counted["up"], down=counted["down"])
