"""The migrations build the schema from nothing, agree with the tables, can be undone, and survive a common start."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import inspect, text

from persistence import schema
from persistence.database import Database, connect
from persistence.errors import StorageError
from persistence.table_base import Table


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.services)])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The address of a database without any table: on PostgreSQL a schema of its own, so other tests keep theirs."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/empty.sqlite3"
        return
    address: str = request.getfixturevalue("postgresql_url")
    engine = connect(address)
    with engine.begin() as connection:
        connection.execute(text("CREATE SCHEMA empty"))
    yield f"{address}?options=-csearch_path%3Dempty"
    with engine.begin() as connection:
        connection.execute(text("DROP SCHEMA empty CASCADE"))
    engine.dispose()


def tables(url: str) -> set[str]:
    engine = connect(url)
    names = set(inspect(engine).get_table_names())
    engine.dispose()
    return names


def test_migrations_build_what_the_tables_say(empty_url: str) -> None:
    schema.upgrade(empty_url)
    engine = connect(empty_url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, Table.metadata) == []
    engine.dispose()
    assert tables(empty_url) == set(Table.metadata.tables) | {"alembic_version"}


def test_upgrading_again_changes_nothing_and_the_schema_says_that_it_is_current(empty_url: str) -> None:
    database = Database(empty_url)
    with database.reading() as session:
        assert not schema.is_current(session)
    schema.upgrade(empty_url)
    schema.upgrade(empty_url)
    with database.reading() as session:
        assert schema.is_current(session)
    database.dispose()


def test_a_migration_can_be_undone(empty_url: str) -> None:
    schema.upgrade(empty_url)
    engine = connect(empty_url)
    with engine.begin() as connection:
        config = schema.alembic_config()
        config.attributes["connection"] = connection
        command.downgrade(config, "base")
    engine.dispose()
    assert tables(empty_url) == {"alembic_version"}
    schema.upgrade(empty_url)
    assert tables(empty_url) > {"runs"}


def test_the_rows_of_runs_prepared_before_are_registered_so_that_no_sweep_takes_them(empty_url: str) -> None:
    schema.upgrade(empty_url, revision="0002")
    rows = {"training": "1" * 64, "validation": "2" * 64, "test": None}
    time = "2026-03-01 12:00:00"
    engine = connect(empty_url)
    with engine.begin() as connection:
        for run_id, metrics in (("run_1", {"rows": rows}), ("run_2", {"rows": rows}), ("run_3", {})):
            connection.execute(
                text(
                    "INSERT INTO runs (id, name, status, config, current_round, created_at)"
                    " VALUES (:id, 'run', 'running', '{}', 1, :time)"
                ),
                {"id": run_id, "time": time},
            )
            connection.execute(
                text(
                    "INSERT INTO versions (run_id, number, promoted, num_updates, metrics, created_at)"
                    " VALUES (:id, 0, true, 0, :metrics, :time)"
                ),
                {"id": run_id, "metrics": json.dumps(metrics), "time": time},
            )
    schema.upgrade(empty_url)
    with engine.connect() as connection:
        uses = connection.execute(text("SELECT run_id, sha256, kind FROM run_artifacts ORDER BY run_id, sha256")).all()
        assert [tuple(each) for each in uses] == [
            (run_id, sha256, "rows") for run_id in ("run_1", "run_2") for sha256 in ("1" * 64, "2" * 64)
        ]
        assert connection.scalar(text("SELECT count(*) FROM artifacts")) == 2
    engine.dispose()


def test_rows_survive_an_upgrade_and_belong_to_the_default_federation(empty_url: str) -> None:
    """SQLite alters a table by copying it, and rows refer to each other."""
    schema.upgrade(empty_url, revision="0002")
    engine = connect(empty_url)
    time = "2026-03-01 12:00:00"
    rows = {
        "enrolment_tokens": {"id": "tok", "token_sha256": "t", "uses": 1, "used": 1, "note": ""}
        | {"created_at": time, "expires_at": time},
        "devices": {"id": "dev", "name": "a", "status": "registered", "credential_sha256": "c", "token_id": "tok"}
        | {"profile": "{}", "activity": "idle", "enrolled_at": time, "last_seen_at": time},
        "runs": {"id": "run", "name": "r", "status": "running", "config": "{}", "current_round": 1, "created_at": time},
        "rounds": {"id": "rnd", "run_id": "run", "number": 1, "status": "published", "base_version": 0, "metrics": "{}"}
        | {"opened_at": time, "deadline_at": time},
        "assignments": {"id": "asg", "run_id": "run", "round_id": "rnd", "device_id": "dev", "status": "counted"}
        | {"losses": "{}", "metrics": "{}", "offered_at": time},
        "versions": {"run_id": "run", "number": 1, "round_id": "rnd", "promoted": True, "num_updates": 1}
        | {"metrics": "{}", "created_at": time},
    }
    with engine.begin() as connection:
        for table, values in rows.items():
            columns, names = ", ".join(values), ", ".join(f":{name}" for name in values)
            connection.execute(text(f"INSERT INTO {table} ({columns}) VALUES ({names})"), values)
    schema.upgrade(empty_url)
    with engine.connect() as connection:
        found = {
            query: connection.execute(text(query)).all()
            for query in (
                "SELECT federation, device_id FROM federation_devices",
                "SELECT federation FROM runs",
                "SELECT attempt FROM rounds",
                "SELECT parent FROM versions",
                "SELECT id FROM assignments",
            )
        }
    engine.dispose()
    assert list(found.values()) == [[("default", "dev")], [("default",)], [(1,)], [(0,)], [("asg",)]]


def test_processes_that_start_together_migrate_once(empty_url: str) -> None:
    program = "import sys; from persistence import schema; schema.upgrade(sys.argv[1])"
    command_line = [sys.executable, "-W", "error", "-c", program, empty_url]
    started = [subprocess.Popen(command_line, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for process in started:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    assert "runs" in tables(empty_url)


def test_a_failed_migration_leaves_nothing(empty_url: str, tmp_path: Path) -> None:
    source = Path(__file__).parents[2] / "migrations"
    broken = tmp_path / "migrations"
    (broken / "versions").mkdir(parents=True)
    (broken / "env.py").write_text((source / "env.py").read_text())
    (broken / "versions" / "0001_broken.py").write_text(
        "import sqlalchemy as sa\nfrom alembic import op\nrevision = '0001'\ndown_revision = None\n"
        "def upgrade():\n"
        "    op.create_table('half', sa.Column('id', sa.Integer(), primary_key=True))\n"
        "    raise RuntimeError('power cut')\n"
    )
    with pytest.raises(RuntimeError, match="power cut"):
        schema.upgrade(empty_url, migrations=broken)
    assert tables(empty_url) == set()


def test_a_missing_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COTUNE_MIGRATIONS", str(tmp_path / "nowhere"))
    with pytest.raises(StorageError, match="COTUNE_MIGRATIONS"):
        schema.upgrade(f"sqlite:///{tmp_path}/x.sqlite3")


def test_alembic_by_hand(tmp_path: Path) -> None:
    """`alembic upgrade head` with the ini file, as an operator would."""
    root = Path(__file__).parents[2]
    file = tmp_path / "byhand.sqlite3"
    done = subprocess.run(
        [sys.executable, "-m", "alembic", "upgrade", "head"],
        cwd=root,
        env={"COTUNE_DATABASE_URL": f"sqlite:///{file}", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "runs" in tables(f"sqlite:///{file}")
