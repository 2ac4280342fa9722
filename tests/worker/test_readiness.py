"""`python -m worker --check`: what a health check is told."""

import os
import subprocess
import sys
from pathlib import Path

from persistence import schema

SERVICES = Path(__file__).parents[2] / "services"


def check(home: Path, **changed: str) -> tuple[int, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COTUNE_")}
    environment |= {"PYTHONPATH": str(SERVICES), "COTUNE_HOME": str(home)} | changed
    done = subprocess.run(
        [sys.executable, "-m", "worker", "--check"], env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout


def test_everything_that_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, said = check(
        tmp_path / "home", COTUNE_BROKER_URL="redis://127.0.0.1:1/0", COTUNE_BLOBS=str(tmp_path / "file")
    )
    assert code == 1
    [database, blobs, queue] = said.splitlines()
    assert database == "database: its schema is not that of this release"
    assert blobs.startswith(f"blobs: the blob folder {tmp_path}/file must be a folder that can be written")
    assert queue.startswith("queue: OperationalError")


def test_a_database_that_does_not_answer_is_named_without_its_password(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    code, said = check(tmp_path, COTUNE_DATABASE_URL="postgresql://cotune:hunter22@127.0.0.1:1/cotune")
    assert code == 1
    assert said.startswith("database: the database does not answer")
    assert len(said.splitlines()) == 1
    assert "hunter22" not in said


def test_a_worker_that_could_work(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    schema.upgrade(f"sqlite:///{tmp_path}/cotune.sqlite3")
    assert check(tmp_path) == (0, "ok\n")
