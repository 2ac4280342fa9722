"""The database's address: where the password comes from, and that no message shows it."""

from pathlib import Path

import pytest

from persistence.addresses import database_address

DEFAULT = "sqlite:///somewhere/cotune.sqlite3"
POSTGRESQL = "postgresql+psycopg://cotune@database:5432/cotune"


def read(**environment: str) -> str:
    return database_address({f"COTUNE_DATABASE_{name}": value for name, value in environment.items()}, DEFAULT)


@pytest.fixture
def password_file(tmp_path: Path) -> Path:
    path = tmp_path / "password"
    path.write_text("p@ss/wörd:#1\n")
    return path


def test_without_a_file_the_address_is_as_given() -> None:
    assert read() == DEFAULT
    assert read(URL=POSTGRESQL, PASSWORD_FILE="") == POSTGRESQL


def test_the_password_of_the_file_is_what_the_server_is_told(password_file: Path) -> None:
    from sqlalchemy import make_url

    address = make_url(read(URL=POSTGRESQL, PASSWORD_FILE=str(password_file)))
    assert address.password == "p@ss/wörd:#1"
    assert (address.username, address.host, address.port, address.database) == ("cotune", "database", 5432, "cotune")
    assert address.drivername == "postgresql+psycopg"


@pytest.mark.parametrize(
    "url",
    ["", "postgresql://database/cotune", "postgresql://cotune:hunter22@database/cotune", "sqlite:///x", "hunter22"],
    ids=["none", "no user", "two passwords", "sqlite", "no address"],
)
def test_a_file_for_an_address_that_takes_none_is_refused(url: str, password_file: Path) -> None:
    with pytest.raises(
        ValueError, match=r"COTUNE_DATABASE_(PASSWORD_FILE|URL): expected .*postgresql://user@host"
    ) as caught:
        read(URL=url, PASSWORD_FILE=str(password_file))
    assert "hunter22" not in str(caught.value)
    assert "p@ss" not in str(caught.value)


def test_a_file_without_a_password_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ValueError, match=r"expected a password in .*/empty, got an empty file"):
        read(URL=POSTGRESQL, PASSWORD_FILE=str(tmp_path / "empty"))
    with pytest.raises(OSError, match=r"COTUNE_DATABASE_PASSWORD_FILE.*nothing, got: No such file"):
        read(URL=POSTGRESQL, PASSWORD_FILE=str(tmp_path / "nothing"))
