"""Downloads from the object store itself: only where operator and client both allow it, never with a credential."""

import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest

from edge_agent.cache import ArtifactCache
from edge_agent.client import CloudClient
from edge_agent.errors import CloudUnavailable
from edge_agent.ledger import Ledger
from persistence.blobs import StoredBlob
from protocol.assignments import ArtifactRef
from tests.cloud_api.running_api import DeviceClient, RunningApi, running_api, settings_in
from tests.edge_agent.fake_cloud import FakeCloud, Handler, running_cloud
from tests.s3_server import address

CONTENT = os.urandom(300_001)
FOLLOW = {"Cotune-Links": "follow"}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory, migrated_file: Path, s3: str) -> Iterator[RunningApi]:
    home = tmp_path_factory.mktemp("home")
    shutil.copy(migrated_file, home / "cotune.sqlite3")
    with running_api(settings_in(home, blobs=address(s3), link_seconds=60)) as running:
        yield running


@pytest.fixture(scope="module")
def device(api: RunningApi) -> DeviceClient:
    return api.enrol()


@pytest.fixture(scope="module")
def blob(api: RunningApi, device: DeviceClient) -> StoredBlob:
    run = api.running_run(device)
    device.poll()
    return api.put(CONTENT, run)


@pytest.fixture
def follower(api: RunningApi, device: DeviceClient, tmp_path: Path) -> Iterator[CloudClient]:
    ledger = Ledger(tmp_path / "ledger.jsonl", lambda: datetime.now(UTC))
    stop = threading.Event()
    with CloudClient(
        api.url, device.credential, ledger, stop, now=lambda: datetime.now(UTC), follow_links=True
    ) as client:
        yield client


def test_a_link_is_given_only_to_who_asks_for_it(device: DeviceClient, blob: StoredBlob) -> None:
    path = f"/v1/artifacts/{blob.sha256}"
    assert device.http.get(path).content == CONTENT
    response = device.http.get(path, headers=FOLLOW, follow_redirects=False)
    assert (response.status_code, response.content) == (307, b"")
    assert response.headers["Cache-Control"] == "no-store"
    assert response.headers["ETag"] == f'"{blob.sha256}"'
    with httpx.Client(trust_env=False) as stranger:
        assert stranger.get(response.headers["Location"]).content == CONTENT
    assert device.http.head(path, headers=FOLLOW, follow_redirects=False).status_code == 200
    unchanged = device.http.get(path, headers=FOLLOW | {"If-None-Match": f'"{blob.sha256}"'}, follow_redirects=False)
    assert unchanged.status_code == 304


def test_a_stranger_gets_no_link(api: RunningApi, blob: StoredBlob) -> None:
    stranger = api.enrol("stranger")
    assert stranger.http.get(f"/v1/artifacts/{blob.sha256}", headers=FOLLOW).status_code == 404


def test_links_are_off_unless_the_operator_turns_them_on(
    api: RunningApi, device: DeviceClient, blob: StoredBlob
) -> None:
    with running_api(replace(api.cloud.settings, link_seconds=0)) as other:
        response = other.client(device.credential).get(f"/v1/artifacts/{blob.sha256}", headers=FOLLOW)
    assert (response.status_code, response.content) == (200, CONTENT)


@pytest.mark.parametrize("there", [0, 100_000], ids=["anew", "resumed"])
def test_the_agent_follows_and_checks_the_digest(
    follower: CloudClient, blob: StoredBlob, tmp_path: Path, there: int
) -> None:
    cache = ArtifactCache(tmp_path / "cache", lambda _what, action: action())
    (tmp_path / "cache" / "files" / f"{blob.sha256}.part").write_bytes(CONTENT[:there])
    path = cache.fetch(follower, ArtifactRef(sha256=blob.sha256, size_bytes=blob.size))
    assert path.read_bytes() == CONTENT


@pytest.fixture
def elsewhere() -> Iterator[FakeCloud]:
    """Another host, which writes down what it is told."""
    with running_cloud() as cloud:
        yield cloud


@pytest.fixture
def pointing(elsewhere: FakeCloud, tmp_path: Path) -> Iterator[tuple[FakeCloud, CloudClient]]:
    """A server that points to the other host, and an agent whose owner allows it."""
    with running_cloud() as cloud:
        ledger = Ledger(tmp_path / "ledger.jsonl", lambda: datetime.now(UTC))
        with CloudClient(
            cloud.url, "dev_1.secret", ledger, threading.Event(), now=lambda: datetime.now(UTC), follow_links=True
        ) as client:
            yield cloud, client


def point_to(url: str) -> object:
    def answer(handler: Handler) -> None:
        handler.send_response(307)
        handler.send_header("Location", url)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def test_the_other_host_learns_nothing_of_the_device(
    elsewhere: FakeCloud, pointing: tuple[FakeCloud, CloudClient]
) -> None:
    cloud, client = pointing
    artifact = elsewhere.add_artifact(b"from elsewhere")
    cloud.fail("artifacts", point_to(f"{elsewhere.url}/v1/artifacts/{artifact.sha256}"))  # type: ignore[arg-type]
    received = bytearray()
    client.download(artifact.sha256, 0, lambda chunk, _position: received.extend(chunk))
    assert received == b"from elsewhere"
    (asked,) = cloud.requests("artifacts")
    assert asked.headers["authorization"] == "Bearer dev_1.secret"
    (request,) = elsewhere.received
    assert "authorization" not in request.headers
    assert "dev_1" not in str(request.headers)
    assert not [name for name in request.headers if name.startswith("cotune")]


@pytest.mark.parametrize(
    "link", ["file:///etc/passwd", "ftp://127.0.0.1/x", "", "/v1/elsewhere", "http://[", "http://127.0.0.1:1/x"]
)
def test_a_place_that_gives_nothing_is_left_and_the_server_asked_for_the_file(
    pointing: tuple[FakeCloud, CloudClient], link: str
) -> None:
    cloud, client = pointing
    artifact = cloud.add_artifact(b"from the server")
    cloud.fail("artifacts", point_to(link))  # type: ignore[arg-type]
    received = bytearray()

    def download() -> None:
        client.download(artifact.sha256, 0, lambda chunk, _position: received.extend(chunk))

    with pytest.raises(CloudUnavailable, match="pointed to a place"):
        download()
    download()
    assert received == b"from the server"
    first, second = cloud.requests("artifacts")
    assert first.headers["cotune-links"] == "follow"
    assert "cotune-links" not in second.headers


def test_who_did_not_allow_links_is_not_led_away(elsewhere: FakeCloud, tmp_path: Path) -> None:
    with running_cloud() as cloud:
        ledger = Ledger(tmp_path / "ledger.jsonl", lambda: datetime.now(UTC))
        with CloudClient(cloud.url, "dev_1.secret", ledger, threading.Event(), now=lambda: datetime.now(UTC)) as client:
            cloud.fail("artifacts", point_to(f"{elsewhere.url}/v1/artifacts/x"))  # type: ignore[arg-type]
            with pytest.raises(CloudUnavailable, match="307"):
                client.download("0" * 64, 0, lambda chunk, position: None)
    assert elsewhere.received == []
