"""`scripts/backup.py` on an embedded cloud: complete while others write, cheap the second time, and wary of damage.

Its other half, PostgreSQL in a deployment, is tried by `make compose-test`.
"""

import shutil
import subprocess
import sys
import threading
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

import pytest

from persistence import enrolment, schema
from persistence.blobs import FolderBlobStore
from persistence.database import Database
from protocol.devices import EnrolmentTokenCreate

PROGRAM = Path(__file__).parents[2] / "scripts" / "backup.py"


def backup(*arguments: str | Path) -> tuple[int, str]:
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def home(tmp_path: Path, migrated_sqlite: Path) -> Path:
    """A home with a migrated database and three files."""
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(migrated_sqlite, home / "cotune.sqlite3")
    for number in range(3):
        FolderBlobStore(home / "blobs").put_bytes(bytes([number]) * 1000)
    return home


def make_token(database: Database) -> None:
    with database.transaction() as session:
        enrolment.create_token(session, EnrolmentTokenCreate(), datetime.now(UTC))


def tokens(home: Path) -> int:
    database = Database(f"sqlite:///{home}/cotune.sqlite3")
    with database.reading() as session:
        number = session.connection().exec_driver_sql("SELECT count(*) FROM enrolment_tokens").scalar()
        assert schema.is_current(session)
        assert session.connection().exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
    database.dispose()
    return int(number or 0)


def test_what_was_committed_before_the_backup_is_in_it_although_others_write(home: Path, tmp_path: Path) -> None:
    database = Database(f"sqlite:///{home}/cotune.sqlite3")
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            make_token(database)

    for _ in range(5):
        make_token(database)
    writer = threading.Thread(target=write)
    writer.start()
    try:
        code, said = backup("save", tmp_path / "backup", "--home", home)
    finally:
        stop.set()
        writer.join()
        database.dispose()
    assert code == 0, said
    assert "3 files" in said
    restored = tmp_path / "restored"
    assert backup("restore", tmp_path / "backup", "--home", restored)[0] == 0
    assert 5 <= tokens(restored) <= tokens(home)
    store = FolderBlobStore(restored / "blobs")
    for number in range(3):
        content = bytes([number]) * 1000
        assert store.path(sha256(content).hexdigest()).read_bytes() == content


def test_a_second_backup_copies_only_what_is_new(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "backup"
    assert backup("save", folder, "--home", home)[0] == 0
    before = {each: each.stat().st_mtime_ns for each in (folder / "objects").glob("??/*")}
    FolderBlobStore(home / "blobs").put_bytes(b"new")
    assert "4 files" in backup("save", folder, "--home", home)[1]
    after = {each: each.stat().st_mtime_ns for each in (folder / "objects").glob("??/*")}
    assert {path: after[path] for path in before} == before
    assert {path.name for path in set(after) - set(before)} == {sha256(b"new").hexdigest()}


def test_a_file_that_was_damaged_is_named_and_nothing_is_restored(home: Path, tmp_path: Path) -> None:
    assert backup("save", tmp_path / "backup", "--home", home)[0] == 0
    damaged = sorted((tmp_path / "backup" / "objects").glob("??/*"))[1]
    damaged.write_bytes(b"other")
    for action in (["check"], ["restore"]):
        code, said = backup(*action, tmp_path / "backup", "--home", tmp_path / "new")
        assert code == 1
        assert damaged.name in said
    assert not (tmp_path / "new").exists()


def test_a_home_that_is_in_use_is_not_written_over(home: Path, tmp_path: Path) -> None:
    assert backup("save", tmp_path / "backup", "--home", home)[0] == 0
    code, said = backup("restore", tmp_path / "backup", "--home", home)
    assert code == 1
    assert "move it away first" in said
    assert "expected a database" in backup("save", tmp_path / "other", "--home", tmp_path / "nothing")[1]
