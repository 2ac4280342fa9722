"""kill -9 of the API between what it does in the blob store and the commit that records it.

Each case names the system call at which the process dies (`dying_api`). After a restart the device asks, goes on and
completes: the file is whole, its bytes are counted once, and after a sweep the store holds nothing else.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from hashlib import sha256
from pathlib import Path

import httpx
import pytest

from protocol.assignments import Assignment, PartUpload
from protocol.safetensors_header import TensorInfo
from tests.cloud_api import dying_api
from tests.cloud_api.running_api import (
    KEY,
    DeviceClient,
    RunningApi,
    delta_for,
    logits,
    plain_client,
    running_api,
    settings_in,
)
from tests.cloud_api.test_process import started
from worker.settings import Settings as WorkerSettings
from worker.sweep import sweep_store

CHUNK = 4 * 2**20
TENSORS = {"a.lora_A.weight": TensorInfo("F32", (1024, 2304))}
"""9 MiB and a header: three chunks."""


@dataclass(frozen=True)
class Sending:
    """A file, and the device that sends it to whichever process serves."""

    home: Path
    device_id: str
    credential: str
    assignment: Assignment
    content: bytes

    @contextmanager
    def to_a_process_that_dies(self, fault: str) -> Iterator[DeviceClient]:
        """Start a process of its own that dies at `fault`. Gives the device, at its address."""
        program = (dying_api.__file__, fault)
        with started(self.home, self.home / "api.log", *program, COTUNE_OPERATOR_KEY=KEY) as process:
            with plain_client(process.url, {"Authorization": f"Bearer {self.credential}"}) as http:
                yield DeviceClient(self.device_id, self.credential, http)
            assert process.popen.wait(10) == -signal.SIGKILL

    @contextmanager
    def to_a_restarted_one(self) -> Iterator[tuple[RunningApi, DeviceClient]]:
        """Serve anew, from what is on disk."""
        with running_api(settings_in(self.home)) as api:
            yield api, DeviceClient(self.device_id, self.credential, api.client(self.credential))

    def asked(self, device: DeviceClient) -> PartUpload:
        response = device.begin(self.assignment, "adapter_delta", self.content)
        assert response.is_success, response.text
        return PartUpload.model_validate_json(response.content)

    def all(self, device: DeviceClient) -> PartUpload:
        """Ask, send what is missing, and complete."""
        upload = self.asked(device)
        while upload.receipt is None:
            response = device.send_chunk(upload, self.content)
            assert response.is_success, response.text
            upload = PartUpload.model_validate_json(response.content)
        return upload

    def first_chunk(self, device: DeviceClient) -> None:
        """Begin with the first chunk, without asking before."""
        device.begin_with_chunk(self.assignment, "adapter_delta", self.content, CHUNK)

    def files(self) -> dict[str, int]:
        """Every file of the store with how many names it has, and every upload's folder."""
        store = self.home / "blobs"
        return {
            str(path.relative_to(store)): path.stat().st_nlink
            for path in store.rglob("*")
            if path.is_file() or path.parent.name == "staged"
        }


@pytest.fixture
def sending(home: Path) -> Sending:
    with running_api(settings_in(home)) as api:
        device = api.enrol()
        api.prepare(api.create_run(device_ids=[device.device_id]), tensors=TENSORS)
        assignment = device.poll()
    assert assignment is not None
    content = delta_for(assignment, tensors=TENSORS)
    assert 2 * CHUNK < len(content) < 3 * CHUNK
    return Sending(home, device.device_id, device.credential, assignment, content)


def sweep(api: RunningApi, home: Path) -> None:
    """Sweep the store as the controller does when all that lies there now is old."""
    settings = WorkerSettings.from_environment({"COTUNE_HOME": str(home)})
    sweep_store(settings, api.cloud.database, api.cloud.blobs, api.cloud.now() + timedelta(days=2))


def whole_and_counted_once(sending: Sending, api: RunningApi, device: DeviceClient) -> None:
    """Hand the update in, twice; look at what is stored and counted, and that a sweep leaves the store's files only."""
    content, other = sending.content, logits()
    assert device.upload(sending.assignment, "logits", other).status_code == 201
    parts = {"adapter_delta": content, "logits": other}
    receipts = [device.submit(sending.assignment, parts) for _ in range(2)]
    assert [each.status_code for each in receipts] == [201, 200]
    run = f"/v1/runs/{sending.assignment.run_id}"
    up = api.operator.get(f"{run}/traffic").json()["up"]
    assert (up["adapter_delta"], up["logits"]) == (len(content), len(other))
    events = [each["type"] for each in api.operator.get(f"{run}/events", params={"limit": 1000}).json()["items"]]
    assert events.count("update.submitted") == 1
    sweep(api, sending.home)
    stored, name = sending.files(), sha256(content).hexdigest()
    assert stored[f"objects/{name[:2]}/{name}"] == 1
    assert (sending.home / "blobs" / "objects" / name[:2] / name).read_bytes() == content
    assert [path for path in stored if not path.startswith("objects/")] == []


@pytest.mark.parametrize(
    ("fault", "send", "there"),
    [
        ("link:before:1", Sending.all, 0),  # the bytes are written and have no name
        ("link:after:1", Sending.all, 0),  # the first chunk is staged and not recorded
        ("link:after:1", Sending.first_chunk, 0),  # nor is its upload
        ("link:after:2", Sending.all, CHUNK),  # a chunk that goes on with the first one's file
        ("replace:before:1", Sending.all, 2 * CHUNK),  # the last one is staged, and the file synchronised
        ("replace:after:1", Sending.all, 2 * CHUNK),  # it is in the store, and there is no receipt
        ("rmtree:before:1", Sending.all, None),  # the receipt is committed, and the chunks' names are left
    ],
    ids=[
        "first-chunk-written",
        "first-chunk-linked",
        "beginning-linked",
        "second-chunk-linked",
        "file-synchronised",
        "file-adopted",
        "receipt-committed",
    ],
)
def test_a_killed_process_leaves_what_can_be_gone_on_with(
    sending: Sending, fault: str, send: Callable[[Sending, DeviceClient], object], there: int | None
) -> None:
    with sending.to_a_process_that_dies(fault) as device, pytest.raises(httpx.TransportError):
        send(sending, device)
    with sending.to_a_restarted_one() as (api, device):
        upload = sending.asked(device)
        assert upload.received_bytes == (len(sending.content) if there is None else there)
        assert (upload.receipt is None) == (there is not None)
        receipt = sending.all(device).receipt
        assert receipt is not None
        assert (receipt.sha256, receipt.size_bytes) == (sha256(sending.content).hexdigest(), len(sending.content))
        whole_and_counted_once(sending, api, device)


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_again_while_the_file_is_put_together_by_copying(sending: Sending, when: str) -> None:
    """No process has taken the whole file, so the chunks are copied into one; the second process dies over that."""
    for fault in ("link:after:2", f"replace:{when}:1"):
        with sending.to_a_process_that_dies(fault) as device, pytest.raises(httpx.TransportError):
            sending.all(device)
    with sending.to_a_restarted_one() as (api, device):
        upload = sending.asked(device)
        assert (upload.received_bytes, upload.receipt) == (len(sending.content), None)
        completed = device.complete(upload)
        assert completed.status_code == 201, completed.text
        whole_and_counted_once(sending, api, device)


@pytest.mark.parametrize("fault", ["link:after:2", "replace:after:1"])
def test_of_a_device_that_never_comes_back_nothing_stays(sending: Sending, fault: str) -> None:
    before = sending.files()
    with sending.to_a_process_that_dies(fault) as device, pytest.raises(httpx.TransportError):
        sending.all(device)
    with sending.to_a_restarted_one() as (api, _):
        assert sending.files() != before
        sweep(api, sending.home)
        assert sending.files() == before
