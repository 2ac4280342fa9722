"""Settings from the environment: defaults that hang together, and refusals that say what came."""

from pathlib import Path

import pytest

from protocol.queue import queue_folder
from worker.settings import Settings, prepare_folders


def test_everything_embedded_lies_under_home(tmp_path: Path) -> None:
    settings = Settings.from_environment({"COTUNE_HOME": str(tmp_path / "h")})
    assert settings.database_url == f"sqlite:///{tmp_path}/h/cotune.sqlite3"
    assert queue_folder(settings.broker_url) == tmp_path / "h" / "queue"
    assert settings.blobs == tmp_path / "h" / "blobs"
    prepare_folders(settings)
    assert (tmp_path / "h" / "queue").is_dir()


def test_services_are_named_by_the_environment(tmp_path: Path) -> None:
    settings = Settings.from_environment(
        {
            "COTUNE_HOME": str(tmp_path),
            "COTUNE_DATABASE_URL": "postgresql://cotune@database/cotune",
            "COTUNE_BROKER_URL": "redis://broker:6379/0",
            "COTUNE_QUEUE_PREFIX": "t_",
            "COTUNE_TORCH_THREADS": "3",
            "COTUNE_LEASE_SECONDS": "2.5",
        }
    )
    assert settings.broker_url == "redis://broker:6379/0"
    assert (settings.torch_threads, settings.lease_seconds, settings.queue_prefix) == (3, 2.5, "t_")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("COTUNE_TORCH_THREADS", "many"),
        ("COTUNE_TORCH_THREADS", "0"),
        ("COTUNE_LEASE_SECONDS", "nan"),
        ("COTUNE_SWEEP_SECONDS", "-1"),
        ("COTUNE_ORPHAN_GRACE_SECONDS", "2592001"),
        ("COTUNE_BLOBS", "ftp://x"),
        ("COTUNE_LOG_FORMAT", "xml"),
        ("COTUNE_BROKER_URL", "amqp://x"),
        ("COTUNE_QUEUE_PREFIX", "a/b"),
    ],
)
def test_a_value_that_cannot_be_used_is_refused(name: str, value: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"expected.*{value}"):
        Settings.from_environment({"COTUNE_HOME": str(tmp_path), name: value})


def test_a_home_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    settings = Settings.from_environment({"COTUNE_HOME": str(tmp_path / "file" / "home")})
    with pytest.raises(OSError, match="file/home"):
        prepare_folders(settings)


def test_the_databases_password_may_come_from_a_file_and_is_never_shown(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("hunter22\n")
    settings = Settings.from_environment(
        {
            "COTUNE_HOME": str(tmp_path),
            "COTUNE_DATABASE_URL": "postgresql://cotune@database/cotune",
            "COTUNE_DATABASE_PASSWORD_FILE": str(tmp_path / "password"),
        }
    )
    assert settings.database_url == "postgresql://cotune:hunter22@database/cotune"
    assert "hunter22" not in repr(settings)
