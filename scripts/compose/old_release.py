"""A database as a deployment of the first release left it: its schema, a completed run and a device.

The rows are messages of that release, recorded for the tests of the protocol. The migration job has to bring them up to
date, and today's API to show them.
"""

import json
from typing import Any

from scripts.compose.engine import ROOT, Engine, Failed

FIRST_REVISION = "0001"
RUN_NAME = "run of the first release"
TIME = "2026-03-01 12:00:00+00"


def leave_database(engine: Engine) -> None:
    """Make the first release's schema in an empty database, with rows."""
    alembic = ("python", "-m", "alembic", "upgrade", FIRST_REVISION)
    engine.compose_call("run", "--rm", "--no-deps", "migrate", *alembic)
    run, device = _recorded("run"), _recorded("device")
    rows: dict[str, dict[str, Any]] = {
        "enrolment_tokens": {
            "id": "tok_1", "token_sha256": "0" * 64, "uses": 1, "used": 1, "note": "", "created_at": TIME,
            "expires_at": TIME,
        },
        "devices": {
            "id": device["device_id"], "name": device["name"], "status": "offline", "credential_sha256": "1" * 64,
            "token_id": "tok_1", "profile": device["profile"], "activity": "idle", "enrolled_at": TIME,
            "last_seen_at": TIME,
        },
        "runs": {
            "id": run["run_id"], "name": RUN_NAME, "status": "completed", "config": run["config"], "current_round": 1,
            "created_at": TIME, "finished_at": TIME,
        },
    }  # fmt: skip
    for table, row in rows.items():
        values = ", ".join(map(_literal, row.values()))
        _query(engine, f"INSERT INTO {table} ({', '.join(row)}) VALUES ({values})")
    if (revision := _query(engine, "SELECT version_num FROM alembic_version")) != FIRST_REVISION:
        raise Failed(f"expected a database at revision {FIRST_REVISION}, got {revision}")


def check_upgraded(engine: Engine, runs: list[Any], devices: list[Any]) -> str:
    """Check that the API shows what was there and return the revision that the database has now.

    Args:
        runs: what `GET /v1/runs` lists.
        devices: what `GET /v1/devices` lists.
    """
    recorded_run, recorded_device = _recorded("run"), _recorded("device")
    [run] = [each for each in runs if each["name"] == RUN_NAME]
    [device] = [each for each in devices if each["device_id"] == recorded_device["device_id"]]
    expected = {"run_id": recorded_run["run_id"], "status": "completed", "config": recorded_run["config"]}
    if not (_has(run, expected) and _has(device["profile"], recorded_device["profile"])):
        raise Failed(f"expected the first release's run and device after the upgrade, got {run} and {device}")
    revision = _query(engine, "SELECT version_num FROM alembic_version")
    newest = max(path.name[:4] for path in (ROOT / "migrations" / "versions").glob("[0-9]*.py"))
    if revision != newest:
        raise Failed(f"expected the database at revision {newest} after the migration job, got {revision}")
    return revision


def _has(whole: Any, part: Any) -> bool:
    """Whether JSON has all that `part` has; later releases add fields."""
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(name in whole and _has(whole[name], part[name]) for name in part)
    return bool(whole == part)


def _recorded(name: str) -> dict[str, Any]:
    path = ROOT / "tests" / "contracts" / "messages" / f"{name}.json"
    return dict(json.loads(path.read_text())["message"])


def _literal(value: Any) -> str:
    if isinstance(value, dict):
        value = json.dumps(value)
    return str(value) if isinstance(value, int) else f"$text${value}$text$"


def _query(engine: Engine, statement: str) -> str:
    psql = ("psql", "-U", "cotune", "-d", "cotune", "-v", "ON_ERROR_STOP=1", "-Atqc", statement)
    return engine.compose_call("exec", "-T", "database", *psql).strip()
