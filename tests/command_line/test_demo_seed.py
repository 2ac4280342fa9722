"""`cotune demo-seed` against a real API: what it writes, what it creates, and that doing it twice changes nothing."""

import os
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from command_line import demo_settings
from command_line.api_client import ApiClient
from command_line.demo_seed import Seed, plant
from command_line.live_view import view
from edge_agent import identity
from edge_agent.settings import validate
from protocol.statuses import RunStatus
from tests.command_line.conftest import Cotune, RunningApi
from tests.command_line.test_base_models import RECIPE


@pytest.fixture
def client(api: RunningApi, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiClient]:
    monkeypatch.setattr(demo_settings, "FACTS", replace(demo_settings.FACTS, base_models=RECIPE))
    with ApiClient(api.address, api.key) as client:
        yield client


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    found = [each for each in sorted(folder.rglob("*")) if each.is_file()]
    return {str(each.relative_to(folder)): (each.stat().st_mtime_ns, each.read_bytes()) for each in found}


def test_a_device_finds_all_that_it_needs_and_a_second_planting_changes_nothing(
    client: ApiClient, tmp_path: Path, api: RunningApi, run_cotune: Cotune, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "demo"
    folder.mkdir()
    with view(Console(quiet=True)) as shown:
        run = plant(Seed(folder, rounds=2), client, shown)
    assert (run.status, run.config.rounds, run.config.min_updates) == (RunStatus.PENDING, 2, 3)
    devices = sorted((folder / "devices").iterdir())
    assert [each.name for each in devices] == ["laptop", "phone", "tablet"]
    for device in devices:
        problems: list[str] = []
        values = {
            "server": {"url": api.address},
            "device": {"id": "none", "name": device.name, "domain": (device / "domain").read_text()},
            "model": {"path": str(device / "model")},
            "data": {"train": str(device / "train.jsonl"), "test": str(device / "test.jsonl")},
        }
        config = validate(values, "test", problems)
        assert config is not None
        assert identity.check_inputs(config, problems) is not None, problems
        assert stat.S_IMODE((device / "token").stat().st_mode) == 0o600
        assert not os.readlink(device / "model").startswith("/")
    assert len({(device / "token").read_text() for device in devices}) == 3

    before = files(folder)
    monkeypatch.setenv("COTUNE_OPERATOR_KEY", api.key)
    ended = run_cotune("demo-seed", str(folder), "--server", api.address)
    assert ended.code == 0, ended.err
    assert run.run_id in ended.out
    assert files(folder) == before
