"""Where things are on this machine, and what is said when they cannot be there."""

import os
import socket
import stat
from pathlib import Path

import pytest

from command_line import folders
from command_line.errors import BadInput, NotAuthorised
from command_line.exit_codes import ExitCode
from command_line.ports import free_port, require_free


def test_folders_follow_the_environment() -> None:
    assert folders.home_folder({"COTUNE_HOME": "/srv/cotune"}) == Path("/srv/cotune")
    assert folders.home_folder({"XDG_DATA_HOME": "/data"}) == Path("/data/cotune")
    assert folders.cache_folder({"COTUNE_CACHE": "/cache"}) == Path("/cache")
    assert folders.cache_folder({"XDG_CACHE_HOME": "/xdg"}) == Path("/xdg/cotune")
    assert folders.cache_folder({}) == Path.home() / ".cache" / "cotune"


def test_a_folder_that_cannot_be_made_names_itself_and_the_variable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput) as caught:
        folders.prepare(tmp_path / "file" / "cache", what="the cache folder", variable="COTUNE_CACHE")
    assert str(tmp_path / "file" / "cache") in caught.value.message
    assert "Not a directory" in caught.value.message
    assert "COTUNE_CACHE" in (caught.value.next_step or "")
    assert caught.value.exit_code == ExitCode.BAD_INPUT


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(BadInput, match="Permission denied"):
        folders.prepare(tmp_path, what="the cache folder", variable="COTUNE_CACHE")


def test_the_operator_key_is_made_once_and_is_secret(tmp_path: Path) -> None:
    path = folders.make_operator_key(tmp_path)
    key = path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(key.strip()) >= 32
    assert folders.make_operator_key(tmp_path).read_text() == key
    assert folders.operator_key({"COTUNE_HOME": str(tmp_path)}) == key.strip()


def test_the_operator_key_is_looked_for_in_order(tmp_path: Path) -> None:
    named = tmp_path / "key"
    named.write_text("from-file\n")
    everywhere = {"COTUNE_OPERATOR_KEY": "given", "COTUNE_OPERATOR_KEY_FILE": str(named), "COTUNE_HOME": str(tmp_path)}
    assert folders.operator_key(everywhere) == "given"
    del everywhere["COTUNE_OPERATOR_KEY"]
    assert folders.operator_key(everywhere) == "from-file"
    named.write_text("")
    with pytest.raises(NotAuthorised, match="empty"):
        folders.operator_key(everywhere)
    with pytest.raises(NotAuthorised) as caught:
        folders.operator_key({"COTUNE_HOME": str(tmp_path / "nowhere")})
    assert "COTUNE_OPERATOR_KEY" in (caught.value.next_step or "")


def test_the_server_is_looked_for_in_order(tmp_path: Path) -> None:
    home = {"COTUNE_HOME": str(tmp_path)}
    assert folders.server_address(home) == "http://127.0.0.1:8000"
    (tmp_path / folders.ADDRESS_FILE).write_text("http://127.0.0.1:9\n")
    assert folders.server_address(home) == "http://127.0.0.1:9"
    assert folders.server_address(home | {"COTUNE_SERVER": "https://cloud"}) == "https://cloud"


def test_a_port_in_use_is_told_apart_from_a_free_one() -> None:
    require_free("127.0.0.1", free_port())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(BadInput, match="Address already in use") as caught:
            require_free("127.0.0.1", port)
    assert str(port) in caught.value.message
    assert "--port" in (caught.value.next_step or "")
