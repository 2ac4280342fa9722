"""Removes what the blob store holds and nothing refers to: files whose writer died before it registered them, chunks of
forgotten uploads, and what was left half written.

A file is in the store before its row is in the database, so a young file without a row is somebody's who is about to
register it; only older ones are looked at. An old one may be wanted again at this very moment: a second upload of the
same content finds it there, writes nothing, and registers it. So the sweep takes the row's place first. It inserts the
row, deletes the file, and rolls back. Whoever registers the same hash meanwhile waits for that (PostgreSQL: for the
key; SQLite: for the one writer), and then `Database.transaction` finds the file gone and refuses to commit: the
uploader sends it again, the worker does its stage again. Whoever registered before makes the insert find a row, and the
file stays.
"""

from collections.abc import Iterator
from datetime import datetime
from itertools import islice
from typing import TypeVar

from sqlalchemy import select

from persistence import part_uploads
from persistence.blobs import BlobStore, StoredObject
from persistence.database import Database
from persistence.inserting import insert_or_keep
from persistence.tables import ArtifactRow

PAGE = 500
"""Hashes that are asked for at once."""

Item = TypeVar("Item")


def remove_orphans(database: Database, blobs: BlobStore, before: datetime, now: datetime) -> int:
    """Remove files that nothing refers to and that are older than `before`; return how many."""
    removed = 0
    for page in _pages(each for each in blobs.objects() if each.modified < before):
        with database.reading() as session:
            known = set(
                session.scalars(
                    select(ArtifactRow.sha256).where(ArtifactRow.sha256.in_([each.sha256 for each in page]))
                )
            )
        removed += sum(_remove(database, blobs, each, before, now) for each in page if each.sha256 not in known)
    return removed


def remove_left_stages(database: Database, blobs: BlobStore, before: datetime) -> int:
    """Remove the chunks of uploads that are no more, and that are older than `before`; return of how many uploads."""
    removed = 0
    for page in _pages(stage for stage, modified in blobs.stages() if modified < before):
        with database.reading() as session:
            known = part_uploads.known_stages(session, page)
        for stage in page:
            if stage not in known:
                blobs.drop_stage(stage)
                removed += 1
    return removed


def _remove(database: Database, blobs: BlobStore, found: StoredObject, before: datetime, now: datetime) -> bool:
    with database.holding() as session:
        place: dict[str, object] = {"sha256": found.sha256, "size_bytes": found.size, "created_at": now}
        if not insert_or_keep(session, ArtifactRow, place):
            return False
        current = blobs.stat(found.sha256)
        if current is None or current.modified >= before:
            return False
        blobs.remove(found.sha256)
        return True


def _pages(items: Iterator[Item]) -> Iterator[list[Item]]:
    while page := list(islice(items, PAGE)):
        yield page
