"""Files in chunks: begun, cut, gone on with, repeated, raced for, wrong, and complete only when they are right."""

import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from threading import Barrier

import httpx
import pytest

from cloud_api.cloud import open_cloud
from persistence import part_uploads
from persistence.blobs import StagedChunk
from persistence.blobs.interface import BlobWriter
from protocol.assignments import Assignment, PartUpload
from protocol.errors import DomainError, ErrorCode
from protocol.part_sizes import most_delta_bytes
from protocol.safetensors_header import TensorInfo
from tests.cloud_api.running_api import (
    KEY,
    TENSORS,
    DeviceClient,
    RunningApi,
    delta_for,
    digest_header,
    logits,
    offset_header,
    running_api,
    settings_in,
    upload_path,
)
from tests.cloud_api.test_process import started
from tests.cloud_api.test_uploads import new_work, refused

Work = tuple[DeviceClient, Assignment]


@pytest.fixture
def work(store_api: RunningApi) -> Work:
    return new_work(store_api)


def begun(device: DeviceClient, assignment: Assignment, content: bytes, kind: str = "adapter_delta") -> PartUpload:
    response = device.begin(assignment, kind, content)
    assert response.status_code in {200, 201}, response.text
    return PartUpload.model_validate_json(response.content)


def sent(device: DeviceClient, upload: PartUpload, content: bytes, offset: int | None = None) -> PartUpload:
    response = device.send_chunk(upload, content, offset)
    assert response.status_code == 200, response.text
    assert response.headers["Upload-Offset"] == str(response.json()["received_bytes"])
    return PartUpload.model_validate_json(response.content)


def left_by_a_killed_process(api: RunningApi, device: DeviceClient, upload: PartUpload, content: bytes) -> PartUpload:
    """Send all of a file, the last chunk as a process takes it that is killed between its record and the completion."""
    while upload.received_bytes + upload.chunk_bytes < upload.size_bytes:
        upload = sent(device, upload, content)
    offset, upload_id = upload.received_bytes, str(upload.upload_id)
    chunk = content[offset:]
    with api.cloud.blobs.chunk_writer(upload_id, offset, len(chunk)) as writer:
        writer.write(chunk)
        sha256_hex = writer.commit().sha256
    with api.cloud.database.transaction() as session:
        arguments = (upload.assignment_id, upload.kind, upload_id, offset, sha256_hex, api.cloud.now())
        return part_uploads.record_chunk(session, *arguments)


def staged(api: RunningApi, upload: PartUpload) -> bool:
    return upload.upload_id in api.stages()


def test_a_file_in_chunks_is_stored_submitted_and_counted_as_traffic(store_api: RunningApi, work: Work) -> None:
    device, assignment = work
    parts = {"adapter_delta": delta_for(assignment), "logits": logits()}
    for kind, content in parts.items():
        assert len(content) > 100
        response = device.upload_in_chunks(assignment, kind, content)
        assert response.status_code == 200, response.text
        assert response.json()["receipt"]["sha256"] == sha256(content).hexdigest()
        assert store_api.stored(content)
        again = begun(device, assignment, content, kind)
        assert (again.upload_id, again.received_bytes) == (None, len(content))
        assert again.receipt is not None
        assert again.receipt.model_dump(mode="json") == response.json()["receipt"]
    assert store_api.stages() == []
    assert store_api.left_over() == []
    assert device.submit(assignment, parts).status_code == 201
    counted = store_api.operator.get(f"/v1/runs/{assignment.run_id}/traffic").json()["up"]
    assert {kind: counted[kind] for kind in parts} == {kind: len(content) for kind, content in parts.items()}


def test_what_is_there_is_found_again_and_only_the_rest_is_sent(store_api: RunningApi, work: Work) -> None:
    device, assignment = work
    content = delta_for(assignment)
    upload = begun(device, assignment, content)
    assert (upload.received_bytes, upload.chunk_bytes, upload.size_bytes) == (0, 100, len(content))
    upload = sent(device, upload, content)
    upload = sent(device, upload, content)
    assert upload.received_bytes == 200
    asked = PartUpload.model_validate_json(device.http.get(upload_path(upload)).content)
    again = begun(device, assignment, content)
    assert again.upload_id == asked.upload_id == upload.upload_id
    assert again.received_bytes == asked.received_bytes == 200
    while again.received_bytes < again.size_bytes:
        again = sent(device, again, content)
    assert again.receipt is not None
    assert device.complete(upload).json() == again.receipt.model_dump(mode="json")
    assert not staged(store_api, upload)


def test_a_chunk_twice_is_one_and_another_for_its_place_a_conflict(store_api: RunningApi, work: Work) -> None:
    device, assignment = work
    content = delta_for(assignment)
    upload = sent(device, begun(device, assignment, content), content)
    first = sent(device, upload, content)
    assert sent(device, upload, content, 0).received_bytes == first.received_bytes == 200
    other = bytes(len(content))
    refused(device.send_chunk(upload, other, 100), ErrorCode.UPDATE_CONFLICT, 409)
    chunk = StagedChunk(100, 100, sha256(other[:100]).hexdigest())
    with pytest.raises(DomainError):  # Else a device could fill the disk with chunks for one place.
        store_api.cloud.blobs.open_staged(str(upload.upload_id), chunk)
    assert device.upload_in_chunks(assignment, "adapter_delta", content).status_code == 200


def test_an_upload_that_is_completed_many_times_at_once_is_put_together_once(
    store_api: RunningApi, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, assignment = work
    content = delta_for(assignment)
    upload = left_by_a_killed_process(store_api, device, begun(device, assignment, content), content)
    store = store_api.cloud.blobs
    written: list[int | None] = []
    write = store.writer

    def slowly(size: int | None = None) -> BlobWriter:
        written.append(size)
        time.sleep(0.2)
        return write(size)

    monkeypatch.setattr(store, "writer", slowly)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: device.complete(upload), range(8)))
    assert sorted(answer.status_code for answer in answers) == [200] * 7 + [201]
    assert len({answer.text for answer in answers}) == 1
    assert written == [len(content)]


def test_an_upload_is_not_completed_by_another_file_that_came_at_once(store_api: RunningApi, work: Work) -> None:
    device, assignment = work
    slow, quick = delta_for(assignment), delta_for(assignment, fill=1)
    upload = left_by_a_killed_process(store_api, device, begun(device, assignment, slow), slow)
    assert device.upload(assignment, "adapter_delta", quick).status_code == 201
    refused(device.complete(upload), ErrorCode.UPDATE_CONFLICT, 409)


@pytest.mark.parametrize("offset", [50, 200, 300, 10**6, 2**53])
def test_a_chunk_where_none_is_wanted_is_refused_and_the_right_place_is_told(work: Work, offset: int) -> None:
    device, assignment = work
    content = delta_for(assignment)
    upload = sent(device, begun(device, assignment, content), content)
    chunk = content[:100]
    response = device.http.patch(
        upload_path(upload), content=chunk, headers=digest_header(chunk) | offset_header(offset)
    )
    problem = refused(response, ErrorCode.UPLOAD_OFFSET_MISMATCH, 409)
    assert (problem["expected"], problem["received"]) == (100, offset)


def test_a_chunk_has_its_own_size_and_digest(store_api: RunningApi, work: Work) -> None:
    device, assignment = work
    content = delta_for(assignment)
    upload = begun(device, assignment, content)
    path, place = upload_path(upload), offset_header(0)
    short, wrong = content[:99], digest_header(content[100:200])
    problem = refused(
        device.http.patch(path, content=short, headers=digest_header(short) | place), ErrorCode.INVALID_FIELD, 422
    )
    assert (problem["expected"], problem["received"]) == (100, 99)
    long = content[:101]
    refused(device.http.patch(path, content=long, headers=digest_header(long) | place), ErrorCode.BODY_TOO_LARGE, 413)
    refused(device.http.patch(path, content=content[:100], headers=wrong | place), ErrorCode.DIGEST_MISMATCH, 422)
    refused(device.http.patch(path, content=content[:100], headers=place), ErrorCode.INVALID_FIELD, 422)
    refused(
        device.http.patch(path, content=content[:100], headers=digest_header(content[:100])),
        ErrorCode.INVALID_FIELD,
        422,
    )
    assert begun(device, assignment, content).received_bytes == 0
    assert store_api.left_over() == []


def test_the_size_is_bounded_before_anything_is_kept(work: Work) -> None:
    device, assignment = work
    content = delta_for(assignment)
    most = most_delta_bytes(TENSORS)
    too_large = device.begin(assignment, "adapter_delta", content, Upload_Length=str(most + 1))
    assert refused(too_large, ErrorCode.BODY_TOO_LARGE, 413)["expected"] == most
    refused(device.begin(assignment, "adapter_delta", content, Upload_Length=""), ErrorCode.LENGTH_REQUIRED, 411)
    refused(device.begin(assignment, "adapter_delta", content, Repr_Digest="x"), ErrorCode.INVALID_FIELD, 422)


def test_a_wrong_header_is_refused_with_the_first_chunk(store_api: RunningApi, work: Work) -> None:
    device, assignment = work
    content = b"not a safetensors file at all".ljust(1000)
    upload = begun(device, assignment, content)
    refused(device.send_chunk(upload, content), ErrorCode.NOT_SAFETENSORS, 422)
    assert not staged(store_api, upload)


def test_a_header_longer_than_a_chunk_is_checked_at_the_end(store_api: RunningApi, work: Work) -> None:
    device, assignment = work
    content = delta_for(assignment, tensors=TENSORS | {"extra": TensorInfo("F32", (1,))})
    assert len(content) > 300
    refused(device.upload_in_chunks(assignment, "adapter_delta", content), ErrorCode.WRONG_TENSOR_NAMES, 422)
    assert not store_api.stored(content)
    assert begun(device, assignment, content).received_bytes == 0


def test_an_incomplete_file_cannot_be_completed(work: Work) -> None:
    device, assignment = work
    content = delta_for(assignment)
    upload = sent(device, begun(device, assignment, content), content)
    problem = refused(device.complete(upload), ErrorCode.UPLOAD_OFFSET_MISMATCH, 409)
    assert (problem["expected"], problem["received"]) == (100, len(content))


def test_a_file_that_is_not_the_announced_one_is_forgotten(store_api: RunningApi, work: Work) -> None:
    device, assignment = work
    content, other = delta_for(assignment), delta_for(assignment, fill=1)
    upload = begun(device, assignment, content)
    while upload.received_bytes + upload.chunk_bytes < upload.size_bytes:
        upload = sent(device, upload, other)
    problem = refused(device.send_chunk(upload, other), ErrorCode.DIGEST_MISMATCH, 422)
    assert problem["expected"] == sha256(content).hexdigest()
    refused(device.complete(upload), ErrorCode.UPLOAD_NOT_FOUND, 404)
    assert not staged(store_api, upload)
    assert not store_api.stored(other)
    assert begun(device, assignment, content).received_bytes == 0


def test_another_file_takes_the_place_of_an_unfinished_one(store_api: RunningApi, work: Work) -> None:
    device, assignment = work
    old, new = delta_for(assignment), delta_for(assignment, fill=1)
    upload = sent(device, begun(device, assignment, old), old)
    assert device.upload_in_chunks(assignment, "adapter_delta", new).status_code == 200
    refused(device.send_chunk(upload, old), ErrorCode.UPLOAD_NOT_FOUND, 404)
    refused(device.begin(assignment, "adapter_delta", old), ErrorCode.UPDATE_CONFLICT, 409)
    assert not staged(store_api, upload)


def test_lost_chunks_mean_to_begin_again(store_api: RunningApi, work: Work) -> None:
    device, assignment = work
    content = delta_for(assignment)
    upload = left_by_a_killed_process(store_api, device, begun(device, assignment, content), content)
    store_api.cloud.blobs.drop_stage(upload.upload_id or "")
    refused(device.complete(upload), ErrorCode.UPLOAD_NOT_FOUND, 404)
    upload = sent(device, begun(device, assignment, content), content)
    store_api.cloud.blobs.drop_stage(upload.upload_id or "")
    while upload.received_bytes + upload.chunk_bytes < upload.size_bytes:
        upload = sent(device, upload, content)
    refused(device.send_chunk(upload, content), ErrorCode.UPLOAD_NOT_FOUND, 404)
    assert device.upload_in_chunks(assignment, "adapter_delta", content).status_code == 200


def test_a_device_touches_its_own_uploads_only(store_api: RunningApi, work: Work) -> None:
    device, assignment = work
    content = delta_for(assignment)
    upload = begun(device, assignment, content)
    stranger = store_api.enrol("stranger")
    for response in (
        stranger.begin(assignment, "adapter_delta", content),
        stranger.http.get(upload_path(upload)),
        stranger.send_chunk(upload, content),
        stranger.complete(upload),
    ):
        refused(response, ErrorCode.ASSIGNMENT_NOT_FOUND, 404)
    own, mine = new_work(store_api)
    moved = upload.model_copy(update={"assignment_id": mine.assignment_id})
    refused(own.send_chunk(moved, content), ErrorCode.UPLOAD_NOT_FOUND, 404)


def test_a_round_that_closes_takes_no_further_chunk(store_api: RunningApi) -> None:
    quick, slow = store_api.enrol("quick"), store_api.enrol("slow")
    store_api.running_run(quick, slow)
    theirs, assignment = quick.poll(), slow.poll()
    assert theirs is not None
    assert assignment is not None
    content = delta_for(assignment, fill=7)
    upload = sent(slow, begun(slow, assignment, content), content)
    parts = {"adapter_delta": delta_for(theirs), "logits": logits()}
    for kind, part in parts.items():
        assert quick.upload_in_chunks(theirs, kind, part).status_code == 200
    assert quick.submit(theirs, parts).status_code == 201
    refused(slow.send_chunk(upload, content), ErrorCode.ROUND_CLOSED, 409)
    refused(slow.begin(assignment, "adapter_delta", content), ErrorCode.ROUND_CLOSED, 409)


def test_senders_at_once_through_two_processes_make_one_right_file(store_api: RunningApi, work: Work) -> None:
    """A second application with connections of its own to the same database and store."""
    device, assignment = work
    right, wrong = delta_for(assignment), bytearray(delta_for(assignment))
    wrong[-50:] = b"x" * 50
    with running_api(store_api.cloud.settings) as second:
        other = DeviceClient(device.device_id, device.credential, second.client(device.credential))
        upload = begun(device, assignment, right)
        while upload.receipt is None:
            start = Barrier(4)

            def send(sender: DeviceClient, content: bytes, at: PartUpload = upload, start: Barrier = start) -> int:
                start.wait()
                return sender.send_chunk(at, content).status_code

            last = upload.received_bytes + upload.chunk_bytes >= upload.size_bytes
            with ThreadPoolExecutor(4) as pool:
                senders = [(device, right), (other, right), (device, right), (other, right)]
                answers = set(pool.map(lambda pair: send(*pair), senders))
            # Who comes after the file is complete finds no upload; what it must never do is to spoil the file.
            assert 200 in answers
            assert answers <= ({200, 404} if last else {200})
            upload = begun(device, assignment, right)
            if not last:
                refused(other.send_chunk(upload, right[:99] + b"z", 0), ErrorCode.UPDATE_CONFLICT, 409)
    assert store_api.stored(right)
    assert not store_api.stored(bytes(wrong))
    receipt = begun(device, assignment, right).receipt
    assert receipt is not None
    assert receipt.sha256 == sha256(right).hexdigest()


def test_the_first_chunk_may_come_with_the_beginning(store_api: RunningApi, work: Work) -> None:
    device, assignment = work
    content = delta_for(assignment)
    response = device.begin_with_chunk(assignment, "adapter_delta", content, 150)
    assert (response.status_code, response.headers["Upload-Offset"]) == (201, "150")
    upload = PartUpload.model_validate_json(response.content)
    assert (upload.chunk_bytes, upload.received_bytes) == (150, 150)
    asked = begun(device, assignment, content)
    assert (asked.upload_id, asked.chunk_bytes, asked.received_bytes) == (upload.upload_id, 150, 150)
    again = device.begin_with_chunk(assignment, "adapter_delta", content, 100)
    assert again.status_code == 200
    assert PartUpload.model_validate_json(again.content).received_bytes == 150
    while upload.receipt is None:
        upload = sent(device, upload, content)
    assert store_api.stored(content)
    assert not staged(store_api, asked)
    assert store_api.left_over() == []
    counted = store_api.operator.get(f"/v1/runs/{assignment.run_id}/traffic").json()["up"]
    assert counted["adapter_delta"] == len(content)


def test_a_file_may_be_one_chunk(store_api: RunningApi, work: Work) -> None:
    device, assignment = work
    content = delta_for(assignment)
    before = store_api.stages()
    response = device.begin_with_chunk(assignment, "adapter_delta", content, len(content))
    assert response.status_code == 201, response.text
    assert response.json()["receipt"]["sha256"] == sha256(content).hexdigest()
    assert device.begin_with_chunk(assignment, "adapter_delta", content, len(content)).status_code == 200
    assert store_api.stored(content)
    assert store_api.stages() == before
    assert store_api.left_over() == []


def test_a_first_chunk_that_is_wrong_begins_nothing(store_api: RunningApi, work: Work) -> None:
    device, assignment = work
    content = delta_for(assignment)
    problem = refused(device.begin_with_chunk(assignment, "adapter_delta", content, 99), ErrorCode.INVALID_FIELD, 422)
    assert problem["expected"] == [100, 8 * 2**20]
    other = digest_header(content[1:101])["Content-Digest"]
    spoilt = device.begin_with_chunk(assignment, "adapter_delta", content, 100, Content_Digest=other)
    refused(spoilt, ErrorCode.DIGEST_MISMATCH, 422)
    foreign = b"not a safetensors file at all".ljust(1000)
    refused(device.begin_with_chunk(assignment, "adapter_delta", foreign, 100), ErrorCode.NOT_SAFETENSORS, 422)
    upload = begun(device, assignment, content)
    assert upload.received_bytes == 0
    problem = refused(device.begin_with_chunk(assignment, "adapter_delta", content, 101), ErrorCode.INVALID_FIELD, 422)
    assert problem["expected"] == [100, 100]
    response = device.begin_with_chunk(assignment, "adapter_delta", content, 100)
    assert PartUpload.model_validate_json(response.content).upload_id == upload.upload_id
    assert sent(device, upload, content, 0).received_bytes == 100
    assert store_api.left_over() == []


def test_two_that_begin_with_a_chunk_at_once_begin_one_upload(store_api: RunningApi, work: Work) -> None:
    device, assignment = work
    content = delta_for(assignment)
    before = set(store_api.stages())
    with running_api(store_api.cloud.settings) as second:
        other = DeviceClient(device.device_id, device.credential, second.client(device.credential))
        start = Barrier(4)

        def begin(sender: DeviceClient) -> PartUpload:
            start.wait()
            response = sender.begin_with_chunk(assignment, "adapter_delta", content, 100)
            assert response.is_success, response.text
            return PartUpload.model_validate_json(response.content)

        with ThreadPoolExecutor(4) as pool:
            uploads = list(pool.map(begin, [device, other, device, other]))
        assert {(each.upload_id, each.received_bytes) for each in uploads} == {(uploads[0].upload_id, 100)}
        assert set(store_api.stages()) == before | {uploads[0].upload_id}
        upload = uploads[0]
        for sender in (other, device) * 100:  # in turns, so that no process has the whole file
            upload = sent(sender, upload, content)
            if upload.receipt is not None:
                break
    assert store_api.stored(content)
    assert set(store_api.stages()) == before
    assert store_api.left_over() == []


def test_a_killed_process_loses_no_chunk_that_it_acknowledged(tmp_path: Path, migrated_file: Path) -> None:
    """kill -9 after the first of three chunks of 4 MiB; another process takes the rest."""
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(migrated_file, home / "cotune.sqlite3")
    settings = settings_in(home)
    tensors = {"a.lora_A.weight": TensorInfo("F32", (1024, 2304))}
    with started(home, tmp_path / "1.log", COTUNE_OPERATOR_KEY=KEY) as first:
        operator = httpx.Client(base_url=first.url, headers={"Authorization": f"Bearer {KEY}"}, trust_env=False)
        api = RunningApi(open_cloud(settings), first.url, operator)
        device = api.enrol()
        run = api.create_run(device_ids=[device.device_id])
        api.prepare(run, tensors=tensors)
        assignment = device.poll()
        assert assignment is not None
        content = delta_for(assignment, tensors=tensors)
        upload = begun(device, assignment, content)
        assert upload.chunk_bytes == 4 * 2**20
        upload = sent(device, upload, content)
        first.popen.send_signal(signal.SIGKILL)
        first.popen.wait(10)
    with started(home, tmp_path / "2.log", COTUNE_OPERATOR_KEY=KEY) as second:
        again = DeviceClient(device.device_id, device.credential, httpx.Client(
            base_url=second.url, headers={"Authorization": f"Bearer {device.credential}"}, trust_env=False
        ))  # fmt: skip
        upload = begun(again, assignment, content)
        assert upload.received_bytes == 4 * 2**20
        while upload.receipt is None:
            upload = sent(again, upload, content)
        again.http.close()
    assert api.stored(content)
    api.close()
    api.cloud.close()
