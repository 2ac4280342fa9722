"""`make compose-test` where nothing can run containers: it says so and is no failure."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOOLS = ("sh", "mkdir", "chmod", "mv", "head", "od", "tr")


def test_it_is_skipped_in_words_without_an_engine(tmp_path: Path) -> None:
    for each in TOOLS:
        program = shutil.which(each)
        assert program is not None
        (tmp_path / each).symlink_to(program)
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "compose_test.py")],
        env={"PATH": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "compose-test: SKIPPED: neither Docker with its compose plugin nor Podman with podman-compose works here\n"
    )


def test_secrets_are_made_once_long_and_in_a_folder_of_their_owner(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    command = ["sh", str(ROOT / "scripts" / "make_secrets.sh"), str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    first = {each.name: each.read_text() for each in folder.iterdir()}
    subprocess.run(command, check=True, capture_output=True)
    assert {each.name: each.read_text() for each in folder.iterdir()} == first
    assert set(first) == {"operator.key", "database.password", "grafana.password"}
    assert all(len(each) == 64 and each.isalnum() for each in first.values())
    assert len(set(first.values())) == 3
    assert folder.stat().st_mode & 0o777 == 0o700
