"""Settings: every problem at once, overrides, and a credential that nobody else can read."""

import stat
from pathlib import Path

import pytest

from edge_agent import settings
from edge_agent.errors import ConfigurationError
from edge_agent.settings import Config

VALUES = {
    "server": {"url": "https://cotune.example.org/"},
    "device": {"id": "dev_1", "name": "kitchen tablet", "domain": 'say "hä" \\ 🦜'},
    "model": {"path": "/models/slm"},
    "data": {"train": "/data/train.jsonl", "test": None},
}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    settings.write_config(tmp_path, Config.model_validate(VALUES))
    settings.write_credential(tmp_path, "dev_1.secret")
    return tmp_path


def test_what_was_written_is_read(home: Path) -> None:
    loaded = settings.load(home, {})
    assert loaded.config == Config.model_validate(VALUES)
    assert loaded.config.server.url == "https://cotune.example.org"
    assert (loaded.device_id, loaded.credential) == ("dev_1", "dev_1.secret")
    assert stat.S_IMODE((home / "credential").stat().st_mode) == 0o600


def test_the_environment_overrides(home: Path) -> None:
    config = settings.load(home, {"COTUNE_TORCH_THREADS": "3", "COTUNE_LOG_FORMAT": "json"}).config
    assert (config.training.torch_threads, config.log.format) == (3, "json")


def test_a_folder_without_identity_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"not enrolled.*cotune-agent enroll"):
        settings.load(tmp_path, {})


def test_a_syntax_error_is_named_with_its_line(home: Path) -> None:
    (home / "agent.toml").write_text("[server]\nurl = \n")
    with pytest.raises(ConfigurationError, match=r"agent\.toml.*line 2"):
        settings.load(home, {})


def test_all_problems_are_shown_at_once(home: Path) -> None:
    (home / "agent.toml").write_text(
        '[server]\nurl = "ftp://x"\n[device]\nid = "dev_1"\nname = "?"\ncolour = "red"\n[data]\ntrain = "t"\n'
    )
    (home / "credential").chmod(0o644)
    with pytest.raises(ConfigurationError) as caught:
        settings.load(home, {"COTUNE_TORCH_THREADS": "many"})
    text = "\n".join(caught.value.problems)
    for expected in (
        "server.url",
        "device.name",
        "device.colour: there is no such setting",
        "model: expected a value, got none",
        "torch_threads",
        "'many'",
        "0600",
        "0644",
    ):
        assert expected in text
    assert len(caught.value.problems) == 6


def test_another_devices_credential_is_noticed(home: Path) -> None:
    settings.write_credential(home, "dev_2.secret")
    with pytest.raises(ConfigurationError, match=r"expected 'dev_2' as in the credential, got 'dev_1'"):
        settings.load(home, {})


@pytest.mark.parametrize("content", ["", "no dot", "dev_ö.secret"])
def test_a_broken_credential_is_a_problem(home: Path, content: str) -> None:
    (home / "credential").write_text(content)
    with pytest.raises(ConfigurationError, match="credential") as caught:
        settings.load(home, {})
    assert "secret" not in str(caught.value).replace("<device id>.<secret>", "")
