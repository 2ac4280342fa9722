"""The sweep of orphans, on every store and database: it takes nothing that somebody is about to use."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest

from persistence import artifacts
from persistence.blobs import BlobStore, FolderBlobStore, StoredBlob
from persistence.database import Database
from persistence.orphans import remove_left_stages, remove_orphans
from persistence.tables import ArtifactRow
from protocol.errors import DomainError, ErrorCode
from tests.persistence.world import World
from tests.s3_server import address, new_store


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    if request.param == "folder":
        return FolderBlobStore(tmp_path / "blobs")
    return new_store(address(request.getfixturevalue("s3")), tmp_path)


class Place:
    """A store and a database that knows it, with a run that may use files."""

    def __init__(self, world: World, store: BlobStore) -> None:
        self.world = world
        self.store = store
        self.database = Database(world.database.engine.url.render_as_string(hide_password=False), stored=store.exists)
        self.run_id = world.create_run().run_id

    def register(self, blob: StoredBlob, *, before_commit: Callable[[], object] = lambda: None) -> None:
        with self.database.transaction() as session:
            artifacts.register(session, blob.sha256, blob.size, "logits", self.run_id, self.world.now)
            before_commit()

    def sweep(self, *, grace: timedelta = timedelta(hours=-1)) -> int:
        """With less than no grace: everything is old."""
        newest = max((each.modified for each in self.store.objects()), default=self.world.now)
        return remove_orphans(self.database, self.store, newest - grace, self.world.now)


@pytest.fixture
def place(world: World, store: BlobStore) -> Iterator[Place]:
    place = Place(world, store)
    yield place
    place.database.dispose()


def test_what_has_a_row_stays_and_what_has_none_goes_when_it_is_old(place: Place) -> None:
    used, orphan = place.store.put_bytes(b"used"), place.store.put_bytes(b"orphan")
    place.register(used)
    assert place.sweep(grace=timedelta(hours=1)) == 0
    assert place.sweep() == 1
    assert place.store.exists(used.sha256)
    assert not place.store.exists(orphan.sha256)
    assert place.world.count(ArtifactRow) == 1, "the sweep's own row must not stay"
    assert place.sweep() == 0


def test_a_file_that_is_not_there_cannot_be_registered(place: Place) -> None:
    with pytest.raises(DomainError) as caught:
        place.register(StoredBlob("0" * 64, 5))
    assert caught.value.code is ErrorCode.UNAVAILABLE
    assert place.world.count(ArtifactRow) == 0


def test_who_registers_while_the_sweep_removes_the_file_stores_it_again(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sweep has found no row and removes; the same content is uploaded, found in the store, and registered."""
    removing, reused = threading.Event(), threading.Event()
    orphan = place.store.put_bytes(b"wanted again")
    remove = place.store.remove

    def slow_remove(sha256: str) -> None:
        removing.set()
        assert reused.wait(10)
        remove(sha256)

    def upload() -> None:
        assert removing.wait(10)
        again = place.store.put_bytes(b"wanted again")
        reused.set()
        place.register(again)

    monkeypatch.setattr(place.store, "remove", slow_remove)
    with ThreadPoolExecutor(2) as pool:
        swept, uploaded = pool.submit(place.sweep), pool.submit(upload)
        assert swept.result(20) == 1
        with pytest.raises(DomainError) as caught:
            uploaded.result(20)
    assert caught.value.code is ErrorCode.UNAVAILABLE
    assert place.world.count(ArtifactRow) == 0
    place.register(place.store.put_bytes(b"wanted again"))
    assert place.store.exists(orphan.sha256)


def test_what_is_being_registered_when_the_sweep_comes_stays(place: Place) -> None:
    """The row is inserted and not yet committed; the sweep, which has seen none, waits for it and lets the file be."""
    blob = place.store.put_bytes(b"old, and wanted again")
    inserted, sweeping = threading.Event(), threading.Event()

    def hold() -> None:
        inserted.set()
        assert sweeping.wait(10)
        threading.Event().wait(0.3)

    def sweep() -> int:
        assert inserted.wait(10)
        sweeping.set()
        return place.sweep()

    with ThreadPoolExecutor(2) as pool:
        registered, swept = pool.submit(place.register, blob, before_commit=hold), pool.submit(sweep)
        registered.result(20)
        assert swept.result(20) == 0
    assert place.store.exists(blob.sha256)
    assert place.world.count(ArtifactRow) == 1


def test_two_sweeps_and_many_uploaders_at_once_lose_no_registered_file(place: Place) -> None:
    contents = [b"content %d" % number for number in range(6)]
    for content in contents:
        place.store.put_bytes(content)

    def upload(content: bytes) -> None:
        for _ in range(20):
            try:
                place.register(place.store.put_bytes(content))
                return
            except DomainError as error:
                if error.code is not ErrorCode.UNAVAILABLE:
                    raise
        raise AssertionError("never registered")

    actions: list[Callable[[], object]] = [place.sweep, place.sweep]
    actions += [lambda content=content: upload(content) for content in contents]
    for result in place.world.race(actions):
        assert not isinstance(result, Exception), result
    assert len(list(place.store.objects())) == len(contents)
    assert place.world.count(ArtifactRow) == len(contents)
    assert place.sweep() == 0


def test_chunks_of_uploads_that_are_no_more_go_when_they_are_old(place: Place) -> None:
    with place.store.chunk_writer("upl_gone", 0, 100) as writer:
        writer.write(b"chunk")
        writer.commit()
    ((_, staged_at),) = place.store.stages()
    assert remove_left_stages(place.database, place.store, staged_at - timedelta(hours=1)) == 0
    assert remove_left_stages(place.database, place.store, staged_at + timedelta(hours=1)) == 1
    assert list(place.store.stages()) == []
