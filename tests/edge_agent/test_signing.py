"""The device's key: made once, kept for its owner only."""

import stat
from pathlib import Path

import pytest

from edge_agent.signing import KEY_FILE, make_key, public_text, read_key


def test_a_key_is_made_once_and_readable_by_its_owner_only(tmp_path: Path) -> None:
    first, second = make_key(tmp_path), make_key(tmp_path)
    assert public_text(first) == public_text(second)
    assert stat.S_IMODE((tmp_path / KEY_FILE).stat().st_mode) == 0o600
    other = tmp_path / "other"
    other.mkdir()
    assert public_text(make_key(other)) != public_text(first)


@pytest.mark.parametrize("content", [b"", b"no base64!", b"c2hvcnQ="])
def test_a_file_that_is_no_key_is_named_and_not_shown(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / KEY_FILE
    path.write_bytes(content)
    path.chmod(0o600)
    problems: list[str] = []
    assert read_key(path, problems) is None
    assert str(path) in problems[0]
    assert not content or content.decode() not in problems[0]
    with pytest.raises(ValueError, match="32 bytes"):
        make_key(tmp_path)


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    make_key(tmp_path)
    (tmp_path / KEY_FILE).chmod(0o644)
    problems: list[str] = []
    assert read_key(tmp_path / KEY_FILE, problems) is None
    assert "0600" in problems[0]
