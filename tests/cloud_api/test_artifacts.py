"""Downloads: whole, resumed, not changed, and counted."""

import hashlib
import os

import httpx
import pytest

from persistence.blobs import StoredBlob
from protocol.errors import ErrorCode
from protocol.headers import CONTENT_DIGEST_HEADER, content_digest
from protocol.runs import Run
from tests.cloud_api.running_api import DeviceClient, RunningApi, eventually

CONTENT = os.urandom(700_001)  # more than two chunks, and not a multiple of one


@pytest.fixture(scope="module")
def api(store_api: RunningApi) -> RunningApi:
    """With either kind of blob store."""
    return store_api


@pytest.fixture(scope="module")
def device(api: RunningApi) -> DeviceClient:
    return api.enrol()


@pytest.fixture(scope="module")
def run(api: RunningApi, device: DeviceClient) -> Run:
    run = api.running_run(device)
    device.poll()
    return run


@pytest.fixture(scope="module")
def blob(api: RunningApi, run: Run) -> StoredBlob:
    return api.put(CONTENT, run)


@pytest.fixture
def etag(blob: StoredBlob) -> str:
    return f'"{blob.sha256}"'


def fetch(device: DeviceClient, blob: StoredBlob, method: str = "GET", **headers: str) -> httpx.Response:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return device.http.request(method, f"/v1/artifacts/{blob.sha256}", headers=names)


def test_the_whole_file(device: DeviceClient, blob: StoredBlob, etag: str) -> None:
    response = fetch(device, blob)
    assert (response.status_code, response.content) == (200, CONTENT)
    assert response.headers["Content-Length"] == str(len(CONTENT))
    assert response.headers["ETag"] == etag
    assert response.headers["Accept-Ranges"] == "bytes"
    digest = content_digest(hashlib.sha256(CONTENT).hexdigest())
    assert response.headers[CONTENT_DIGEST_HEADER] == digest
    assert response.headers["Repr-Digest"] == digest


def test_a_head_has_the_headers_and_no_body(device: DeviceClient, blob: StoredBlob, etag: str) -> None:
    response = fetch(device, blob, "HEAD")
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["Content-Length"] == str(len(CONTENT))
    assert response.headers["ETag"] == etag


@pytest.mark.parametrize(("first", "last"), [(0, 0), (5, 262_144), (262_144, None), (700_000, None), (None, 10)])
def test_a_range(device: DeviceClient, blob: StoredBlob, first: int | None, last: int | None) -> None:
    header = f"bytes={'' if first is None else first}-{'' if last is None else last}"
    expected = CONTENT[-(last or 0) :] if first is None else CONTENT[first : None if last is None else last + 1]
    response = fetch(device, blob, Range=header)
    assert (response.status_code, response.content) == (206, expected)
    start = len(CONTENT) - len(expected) if first is None else first
    assert response.headers["Content-Range"] == f"bytes {start}-{start + len(expected) - 1}/{len(CONTENT)}"
    assert CONTENT_DIGEST_HEADER not in response.headers
    assert response.headers["Repr-Digest"] == content_digest(blob.sha256)


def test_a_cut_download_goes_on_where_it_stopped(device: DeviceClient, blob: StoredBlob, etag: str) -> None:
    there = CONTENT[:300_000]
    rest = fetch(device, blob, Range=f"bytes={len(there)}-", If_Range=etag)
    assert rest.status_code == 206
    assert hashlib.sha256(there + rest.content).hexdigest() == blob.sha256
    other = fetch(device, blob, Range=f"bytes={len(there)}-", If_Range='"another"')
    assert (other.status_code, other.content) == (200, CONTENT)


def test_a_range_outside_the_file(device: DeviceClient, blob: StoredBlob) -> None:
    response = fetch(device, blob, Range=f"bytes={len(CONTENT)}-")
    assert (response.status_code, response.json()["code"]) == (416, ErrorCode.RANGE_NOT_SATISFIABLE)
    assert response.headers["Content-Range"] == f"bytes */{len(CONTENT)}"


def test_what_the_client_has_is_not_sent_again(device: DeviceClient, blob: StoredBlob, etag: str) -> None:
    for header in (etag, f'"x", W/{etag}', "*"):
        response = fetch(device, blob, If_None_Match=header, Range="bytes=0-1")
        assert (response.status_code, response.content) == (304, b"")
        assert response.headers["ETag"] == etag
    assert fetch(device, blob, If_None_Match='"x"').status_code == 200


def test_hashes_that_are_none_or_of_nothing(api: RunningApi, device: DeviceClient) -> None:
    assert device.http.get("/v1/artifacts/nonsense").json()["code"] == ErrorCode.INVALID_FIELD
    assert api.operator.get(f"/v1/artifacts/{'A' * 64}").json()["code"] == ErrorCode.INVALID_FIELD
    assert device.http.get(f"/v1/artifacts/{'0' * 64}").json()["code"] == ErrorCode.ARTIFACT_NOT_FOUND
    assert api.operator.get("/v1/artifacts/..%2f..%2foperator.key").status_code in {404, 422}


def test_an_empty_file(api: RunningApi, device: DeviceClient, run: Run) -> None:
    empty = api.put(b"", run)
    assert fetch(device, empty).content == b""
    assert fetch(device, empty, Range="bytes=0-").status_code == 416


def test_a_file_that_the_store_has_lost(api: RunningApi, device: DeviceClient, run: Run) -> None:
    lost = api.put(b"to be lost", run)
    api.cloud.blobs.remove(lost.sha256)
    assert fetch(device, lost).json()["code"] == ErrorCode.ARTIFACT_NOT_FOUND


def test_only_get_knows_ranges(api: RunningApi, device: DeviceClient, run: Run) -> None:
    blob = api.put(b"x" * 1000, run)
    asked = device.http.head(f"/v1/artifacts/{blob.sha256}", headers={"Range": "bytes=2000-"})
    assert asked.status_code == 200
    assert asked.headers["Content-Length"] == "1000"
    assert asked.content == b""


def test_what_was_sent_to_devices_is_counted_by_kind(api: RunningApi) -> None:
    device = api.enrol()
    run = api.running_run(device)
    device.poll()
    blob = api.put(b"x" * 1000, run, "proxy_base")
    path = f"/v1/artifacts/{blob.sha256}"
    device.http.get(path)
    device.http.get(path, headers={"Range": "bytes=0-99"})
    device.http.head(path)
    device.http.get(path, headers={"If-None-Match": "*"})
    api.operator.get(path)
    eventually(lambda: api.sent(run.run_id, "proxy_base") == 1100)
