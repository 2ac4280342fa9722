"""The sweep: what waits for nobody is moved on."""

from datetime import timedelta

from persistence import assignments, devices, part_uploads
from persistence.clock import utc_now
from protocol.assignments import AssignmentProgress
from protocol.errors import ErrorCode
from protocol.statuses import AssignmentStatus, DeviceStatus, PartKind, RoundStatus, RunStatus
from tests.worker.cloud import Cloud
from worker.sweep import sweep, sweep_store


def _standalone(cloud: Cloud, **values: object) -> str:
    return cloud.create_run(None, strategy={"name": "standalone"}, public_data=None, **values).run_id


def test_waiting_jobs_are_sent_again_once_an_interval(cloud: Cloud) -> None:
    _standalone(cloud)
    (job_id,) = cloud.sent
    now = utc_now()
    for seconds, sent in ((1, 1), (11, 2), (15, 2), (22, 3)):
        sweep(cloud.settings, cloud.database, now + timedelta(seconds=seconds))
        assert cloud.sent == [job_id] * sent


def test_an_overdue_round_is_closed_and_its_devices_told(cloud: Cloud) -> None:
    done, silent = cloud.enrol("done", "silent")
    run_id = _standalone(cloud, round_deadline_seconds=60.0)
    cloud.work()
    late = cloud.take(silent)
    progress = AssignmentProgress(status=AssignmentStatus.TRAINING)
    cloud.call(assignments.report_progress, silent, late.assignment_id, progress, utc_now())
    cloud.deliver(cloud.take(done), done, {}, metrics={"alignment": None})
    sweep(cloud.settings, cloud.database, utc_now() + timedelta(seconds=61))
    assert cloud.round(run_id).status is RoundStatus.AGGREGATING
    assert cloud.statuses(run_id) == [AssignmentStatus.SUBMITTED, AssignmentStatus.LOST]
    cloud.work()
    assert cloud.run(run_id).status is RunStatus.COMPLETED


def test_a_round_without_updates_ends_its_run(cloud: Cloud) -> None:
    cloud.enrol("absent")
    run_id = _standalone(cloud, round_deadline_seconds=60.0)
    cloud.work()
    sweep(cloud.settings, cloud.database, utc_now() + timedelta(seconds=61))
    assert cloud.run(run_id).error_code is ErrorCode.TOO_FEW_UPDATES


def test_silent_devices_go_offline(cloud: Cloud) -> None:
    (device,) = cloud.enrol("a")
    limit = cloud.settings.offline_after_seconds
    for seconds, status in ((limit - 5, DeviceStatus.REGISTERED), (limit + 5, DeviceStatus.OFFLINE)):
        sweep(cloud.settings, cloud.database, utc_now() + timedelta(seconds=seconds))
        assert cloud.read(devices.get_device, device).status is status


def test_the_store_is_swept_of_what_nothing_refers_to(cloud: Cloud, llm: str) -> None:
    (device,) = cloud.enrol("a")
    run = cloud.create_run(llm)
    cloud.work()
    assignment = cloud.take(device)
    kept = {each.sha256 for each in cloud.blobs.objects()}
    orphan = cloud.blobs.put_bytes(b"registered by nobody").sha256
    with cloud.blobs.chunk_writer("upl_gone", 0, 100) as writer:
        writer.write(b"a chunk of a forgotten upload")
        writer.commit()
    (cloud.blobs.incoming / "half").write_bytes(b"half")
    arguments = (assignment.assignment_id, PartKind.LOGITS, "0" * 64, 100, 10)
    upload, _ = cloud.call(part_uploads.begin, *arguments, utc_now())
    with cloud.blobs.chunk_writer(upload.upload_id, 0, 100) as writer:
        writer.write(b"a chunk of it")
        writer.commit()

    sweep_store(cloud.settings, cloud.database, cloud.blobs, utc_now())
    assert cloud.blobs.exists(orphan), "it may be somebody's who is about to register it"
    assert {stage for stage, _ in cloud.blobs.stages()} == {"upl_gone", upload.upload_id}

    later = utc_now() + timedelta(seconds=cloud.settings.orphan_grace_seconds + 5)
    sweep_store(cloud.settings, cloud.database, cloud.blobs, later)
    assert {each.sha256 for each in cloud.blobs.objects()} == kept
    assert list(cloud.blobs.stages()) == []
    assert list(cloud.blobs.incoming.iterdir()) == []
    cloud.deliver(assignment, device, cloud.as_parts(cloud.untrained_update(assignment)))
    cloud.work()
    assert cloud.run(run.run_id).status is RunStatus.COMPLETED
    sweep_store(cloud.settings, cloud.database, cloud.blobs, later)
    version = cloud.version(run.run_id, 1)
    assert cloud.blobs.exists(version.proxy_adapter_sha256 or "")
