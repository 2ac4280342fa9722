"""A packed adapter that is unpacked: whole, or nothing; and nothing outside its folder."""

import io
import tarfile
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO

import pytest

from command_line.api_client import ApiClient
from command_line.errors import BadInput, Unreachable
from command_line.packages import pull_package


def archive_of(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def sends(content: bytes) -> Callable[[BinaryIO], None]:
    def download(file: BinaryIO) -> None:
        file.write(content)

    return download


def test_the_files_come_into_the_folder_that_was_named(tmp_path: Path) -> None:
    content = archive_of((member("run-v1-llm/README.md"), b"# card"), (member("run-v1-llm/weights"), b"\0" * 2000))
    pulled = pull_package(tmp_path / "a" / "b", sends(content), next_option="--to")
    assert pulled.files == {"README.md": 6, "weights": 2000}
    assert (tmp_path / "a" / "b" / "README.md").read_bytes() == b"# card"
    assert [each.name for each in (tmp_path / "a").iterdir()] == ["b"]


def test_an_empty_folder_may_be_there_already(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    pull_package(tmp_path / "folder", sends(archive_of((member("x/weights"), b"1"))), next_option="--to")
    assert (tmp_path / "folder" / "weights").read_bytes() == b"1"


@pytest.mark.parametrize(
    "content",
    [
        archive_of((member("run/ok"), b"1"), (member("run/../../escaped"), b"1")),
        archive_of((member("../escaped"), b"1")),
        archive_of((member("/escaped/file"), b"1")),
        archive_of((member("run/link", tarfile.SYMTYPE, "/etc/passwd"), b"")),
        archive_of((member("run/link", tarfile.LNKTYPE, "run/other"), b"")),
        archive_of((member("run/deep/file"), b"1")),
        archive_of((member("alone"), b"1")),
        archive_of((member("run/weights"), b"\1" * 5000))[:1000],
        b"<html>hello</html>" * 100,
    ],
    ids=["up", "parent", "absolute", "symbolic link", "hard link", "deep", "without a folder", "cut", "not a tar"],
)
def test_another_archive_is_refused_and_leaves_nothing(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(Unreachable, match="expected an archive of one folder of files"):
        pull_package(tmp_path / "here" / "folder", sends(content), next_option="--to")
    assert list((tmp_path / "here").iterdir()) == []
    assert [each.name for each in tmp_path.iterdir()] == ["here"]


def test_the_same_name_twice_is_refused(tmp_path: Path) -> None:
    content = archive_of((member("run/weights"), b"1"), (member("run/weights"), b"2"))
    with pytest.raises(BadInput, match="File exists"):
        pull_package(tmp_path / "folder", sends(content), next_option="--to")
    assert list(tmp_path.iterdir()) == []


def test_a_download_that_is_cut_leaves_nothing(tmp_path: Path) -> None:
    class Cutting(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(bytes(1000))

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            return None

    with ThreadingHTTPServer(("127.0.0.1", 0), Cutting) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with ApiClient(f"http://127.0.0.1:{server.server_port}", "key") as client, pytest.raises(Unreachable):
                pull_package(
                    tmp_path / "folder",
                    lambda file: client.download_package("run", 1, "llm", file),
                    next_option="--to",
                )
        finally:
            server.shutdown()
            thread.join()
    assert list(tmp_path.iterdir()) == []
