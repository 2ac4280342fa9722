"""A round whose files are all in an object store: the worker reads checked copies and leaves none."""

from pathlib import Path

from protocol.statuses import AssignmentStatus, RunStatus
from tests.s3_server import address, new_store
from tests.worker.cloud import Cloud
from worker.settings import Settings


def test_a_round_from_the_proxy_to_the_new_version(settings: Settings, llm: str, s3: str, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    cloud = Cloud(settings, blobs=new_store(address(s3), scratch))
    devices = cloud.enrol("a", "b")
    run = cloud.create_run(llm, min_updates=2)
    cloud.work()
    for number, device in enumerate(devices):
        cloud.deliver_untrained(device, seed=number)
    cloud.work()
    assert cloud.run(run.run_id).status is RunStatus.COMPLETED, cloud.run(run.run_id).status_reason
    assert cloud.statuses(run.run_id) == [AssignmentStatus.COUNTED] * 2
    assert cloud.blobs.exists(cloud.version(run.run_id, 1).proxy_adapter_sha256 or "")
    assert list(cloud.blobs.incoming.iterdir()) == []
    assert not settings.blobs.joinpath("objects").exists()  # type: ignore[union-attr]
    cloud.database.dispose()
