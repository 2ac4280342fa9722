"""The database's address from the environment, with a password that is kept in a file.

A password inside an address shows in every listing of a process's environment; a file can be a container's secret.
"""

from collections.abc import Mapping
from pathlib import Path

from sqlalchemy import exc, make_url

URL_VARIABLE = "COTUNE_DATABASE_URL"
PASSWORD_VARIABLE = "COTUNE_DATABASE_PASSWORD_FILE"


def database_address(environment: Mapping[str, str], default: str) -> str:
    """Return `COTUNE_DATABASE_URL`, or `default`; with `COTUNE_DATABASE_PASSWORD_FILE`, that file's password in it.

    Raises:
        ValueError: a password file for an address that takes none (SQLite, no user, or one with a password), an address
            that is not one, or an empty file. No message holds a password.
        OSError: the file cannot be read; the message names it.
    """
    url = environment.get(URL_VARIABLE) or default
    named = environment.get(PASSWORD_VARIABLE)
    if not named:
        return url
    try:
        address = make_url(url)
    except exc.ArgumentError:
        raise ValueError(f"{URL_VARIABLE}: expected an address such as postgresql://user@host/name") from None
    if address.get_backend_name() != "postgresql" or not address.username or address.password:
        shown = address.render_as_string(hide_password=True)
        raise ValueError(
            f"{PASSWORD_VARIABLE}: expected {URL_VARIABLE} to be postgresql://user@host/name, without a password, "
            f"got {shown}"
        )
    return address.set(password=_read(Path(named).expanduser())).render_as_string(hide_password=False)


def _read(path: Path) -> str:
    try:
        password = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise OSError(f"{PASSWORD_VARIABLE}: expected a password in {path}, got: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{PASSWORD_VARIABLE}: expected a password in UTF-8 in {path}") from None
    if not password:
        raise ValueError(f"{PASSWORD_VARIABLE}: expected a password in {path}, got an empty file")
    return password
