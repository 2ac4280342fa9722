"""The queue's configuration: both brokers, prefixes, routes, and refusals."""

from pathlib import Path

import celery
import pytest

from protocol.queue import celery_settings, embedded_broker_url, queue_folder, queue_name
from protocol.statuses import TRAINING_QUEUE, JobKind


def test_embedded_broker_address_names_its_folder() -> None:
    assert queue_folder(embedded_broker_url(Path("/var/lib/co #1 %20"))) == Path("/var/lib/co #1 %20/queue")


@pytest.mark.parametrize("url", ["redis://127.0.0.1:6379/0", "rediss://user:word@host/1"])
def test_redis_has_no_folder_and_keeps_its_address(url: str) -> None:
    assert queue_folder(url) is None
    assert celery_settings(url)["broker_url"] == url
    assert celery_settings(url, "t_")["broker_transport_options"]["global_keyprefix"] == "t_"


@pytest.mark.parametrize("url", ["amqp://localhost", "filesystem://relative/x", "filesystem://", "nonsense"])
def test_other_addresses_are_refused_with_what_came(url: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        celery_settings(url)


@pytest.mark.parametrize("prefix", ["a/b", "a.b", "ü", "x" * 65])
def test_a_prefix_that_could_leave_the_folder_is_refused(prefix: str) -> None:
    with pytest.raises(ValueError, match="queue prefix"):
        queue_name(TRAINING_QUEUE, prefix)


def test_a_sent_job_lands_in_its_queue_and_writes_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "queue"
    folder.mkdir()
    app = celery.Celery("sender", set_as_current=False)
    app.conf.update(celery_settings(embedded_broker_url(tmp_path), "t_"))
    app.send_task(JobKind.AGGREGATE_ROUND.task_name, args=["job-1"])
    queues = [path.name.partition(".")[2] for path in folder.iterdir()]
    assert queues == [f"t_{TRAINING_QUEUE}.msg"]
    assert [path.name for path in tmp_path.iterdir()] == ["queue"]
