"""Settings: defaults, what is refused, and the operator key."""

import secrets
import stat
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from cloud_api.brief_memory import Rate
from cloud_api.security import Rates, check_key
from cloud_api.settings import DEFAULT_UPLOAD_BYTES, Settings
from protocol.statuses import PartKind

KEY = "k" * 32


def read(home: Path, **environment: str) -> Settings:
    return Settings.from_environment({"COTUNE_HOME": str(home), **environment})


def test_everything_is_under_the_home_folder_by_default(tmp_path: Path) -> None:
    home = tmp_path / "new" / "home"
    settings = read(home)
    assert settings.database_url == f"sqlite:///{home}/cotune.sqlite3"
    assert settings.broker_url == f"filesystem://{home}/queue"
    assert settings.blobs == home / "blobs"
    assert (home / "queue").is_dir()
    assert settings.upload_limits == dict.fromkeys(PartKind, DEFAULT_UPLOAD_BYTES)
    assert stat.S_IMODE(home.stat().st_mode) == 0o700


def test_the_operator_key_is_made_once_and_readable_by_its_owner_only(tmp_path: Path) -> None:
    first, second = read(tmp_path), read(tmp_path)
    path = tmp_path / "operator.key"
    assert first.operator_key == second.operator_key == path.read_text().strip()
    assert len(first.operator_key) >= 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert sorted(each.name for each in tmp_path.iterdir()) == ["operator.key", "queue"]


def test_a_key_that_was_given_is_used_and_never_shown(tmp_path: Path) -> None:
    settings = read(tmp_path, COTUNE_OPERATOR_KEY=KEY)
    assert settings.operator_key == KEY
    assert KEY not in repr(settings)
    assert not (tmp_path / "operator.key").exists()
    file = tmp_path / "given"
    file.write_text(f"{KEY}\n")
    assert read(tmp_path, COTUNE_OPERATOR_KEY_FILE=str(file)).operator_key == KEY


def test_deployments_name_their_own_services(tmp_path: Path) -> None:
    settings = read(
        tmp_path,
        COTUNE_DATABASE_URL="postgresql://cotune@database/cotune",
        COTUNE_BROKER_URL="redis://broker:6379/0",
        COTUNE_BLOBS=str(tmp_path / "elsewhere"),
        COTUNE_LOG_FORMAT="json",
        COTUNE_LOG_LEVEL="debug",
        COTUNE_MAX_LOGITS_BYTES="1000",
    )
    assert settings.database_url.startswith("postgresql")
    assert settings.blobs == tmp_path / "elsewhere"
    assert (settings.log_format, settings.log_level) == ("json", "debug")
    assert settings.upload_limits[PartKind.LOGITS] == 1000
    assert not (tmp_path / "queue").exists()


def test_the_databases_password_may_come_from_a_file_and_is_never_shown(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("hunter22\n")
    settings = read(
        tmp_path,
        COTUNE_DATABASE_URL="postgresql://cotune@database/cotune",
        COTUNE_DATABASE_PASSWORD_FILE=str(file),
    )
    assert settings.database_url == "postgresql://cotune:hunter22@database/cotune"
    assert "hunter22" not in repr(settings)


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"COTUNE_REQUIRE_SIGNATURES": "perhaps"}, "COTUNE_REQUIRE_SIGNATURES"),
        ({"COTUNE_RATE_DEVICE": "20"}, "COTUNE_RATE_DEVICE"),
        ({"COTUNE_RATE_FAILURE": "0/5"}, "COTUNE_RATE_FAILURE"),
        ({"COTUNE_RATE_ADDRESS": "nan/5"}, "COTUNE_RATE_ADDRESS"),
        ({"COTUNE_TRUSTED_PROXIES": "10.0.0.0/8, proxy.example"}, "proxy.example"),
        ({"COTUNE_TLS_KEY": "/x"}, "COTUNE_TLS_CERTIFICATE"),
        ({"COTUNE_OPERATOR_KEY": "short"}, "COTUNE_OPERATOR_KEY"),
        ({"COTUNE_OPERATOR_KEY": "a key with many spaces in it"}, "COTUNE_OPERATOR_KEY"),
        ({"COTUNE_OPERATOR_KEY": "ключ" * 8}, "COTUNE_OPERATOR_KEY"),
        ({"COTUNE_LOG_FORMAT": "xml"}, "COTUNE_LOG_FORMAT"),
        ({"COTUNE_LOG_LEVEL": "loud"}, "COTUNE_LOG_LEVEL"),
        ({"COTUNE_BROKER_URL": "amqp://x"}, "amqp://x"),
        ({"COTUNE_QUEUE_PREFIX": "a b"}, "prefix"),
        ({"COTUNE_MAX_LOGITS_BYTES": "0"}, "COTUNE_MAX_LOGITS_BYTES"),
        ({"COTUNE_UPLOAD_CHUNK_BYTES": "1000"}, "COTUNE_UPLOAD_CHUNK_BYTES.*4194304 to 8388608"),
        ({"COTUNE_UPLOAD_CHUNK_BYTES": "9" * 5000}, "COTUNE_UPLOAD_CHUNK_BYTES"),
        ({"COTUNE_LINK_SECONDS": "-1"}, "COTUNE_LINK_SECONDS"),
        ({"COTUNE_BLOBS": "ftp://x"}, "COTUNE_BLOBS"),
        ({"COTUNE_MAX_ADAPTER_DELTA_BYTES": "10 MB"}, "COTUNE_MAX_ADAPTER_DELTA_BYTES"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, environment: Mapping[str, str], told: str) -> None:
    with pytest.raises(ValueError, match=told) as caught:
        read(tmp_path, **environment)
    assert "\n" not in str(caught.value)
    assert environment.get("COTUNE_OPERATOR_KEY", KEY) not in str(caught.value)


def test_a_home_that_cannot_be_a_folder_and_a_key_file_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for home in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match="expected a folder that can be written"):
            read(home)
    with pytest.raises(OSError, match="expected an operator key in"):
        read(tmp_path, COTUNE_OPERATOR_KEY_FILE=str(tmp_path / "nothing"))


GOOD_KEY = "3f9c1a7be24d5680c1f2a9d37e6b4850"
DEPLOYED = {"COTUNE_DATABASE_URL": "postgresql://cotune@database/cotune", "COTUNE_BROKER_URL": "redis://broker:6379/0"}


def test_limits_proxies_and_signatures(tmp_path: Path) -> None:
    embedded = read(tmp_path)
    assert embedded.require_signatures is False
    assert (embedded.rates, embedded.trusted_proxies, embedded.tls) == (Rates(), (), None)
    settings = read(
        tmp_path,
        COTUNE_RATE_DEVICE="0.5/10",
        COTUNE_TRUSTED_PROXIES="10.0.0.0/8, 192.0.2.1",
        COTUNE_REQUIRE_SIGNATURES="on",
    )
    assert settings.rates == replace(Rates(), device=Rate(0.5, 10))
    assert settings.trusted_proxies == ("10.0.0.0/8", "192.0.2.1")
    assert settings.require_signatures is True


@pytest.mark.parametrize("outside", [{name: url} for name, url in DEPLOYED.items()] + [DEPLOYED])
def test_outside_the_embedded_mode_requests_are_signed(tmp_path: Path, outside: dict[str, str]) -> None:
    assert read(tmp_path, COTUNE_OPERATOR_KEY=GOOD_KEY, **outside).require_signatures is True
    changed = outside | {"COTUNE_REQUIRE_SIGNATURES": "off"}
    assert read(tmp_path, COTUNE_OPERATOR_KEY=GOOD_KEY, **changed).require_signatures is False


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"COTUNE_OPERATOR_KEY": GOOD_KEY[:20]}, "at least 32"),
        ({"COTUNE_OPERATOR_KEY": "k" * 32}, "1 different"),
        ({"COTUNE_OPERATOR_KEY": "change-me-change-me-change-me-12345"}, "'change'"),
        ({"COTUNE_OPERATOR_KEY": "put-a-long-random-Secret-here-0123"}, "'secret'"),
        ({"COTUNE_DATABASE_URL": "postgresql://cotune:postgres@database/cotune"}, "COTUNE_DATABASE_URL"),
        ({"COTUNE_DATABASE_URL": "postgresql://cotune:Ch4ng%65@database/cotune"}, "COTUNE_DATABASE_URL"),
        ({"COTUNE_BROKER_URL": "redis://:changeme@broker/0"}, "COTUNE_BROKER_URL"),
    ],
)
def test_outside_the_embedded_mode_known_secrets_are_refused(
    tmp_path: Path, changed: dict[str, str], told: str
) -> None:
    with pytest.raises(ValueError, match=told) as caught:
        read(tmp_path, **(DEPLOYED | {"COTUNE_OPERATOR_KEY": GOOD_KEY} | changed))
    known = ("postgres@", "Ch4ng", "changeme", changed.get("COTUNE_OPERATOR_KEY", GOOD_KEY))
    assert not [secret for secret in known if secret in str(caught.value)]


def test_a_random_key_is_good_everywhere() -> None:
    for key in (secrets.token_hex(16) for _ in range(50)):  # No word of an example has hexadecimal digits only.
        assert check_key(key, "here", embedded=False) == key
