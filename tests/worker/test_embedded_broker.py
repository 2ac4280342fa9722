"""The embedded broker: nothing is taken half-written, taken twice, or left behind."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from queue import Empty
from typing import Any

import celery
import pytest
from kombu.transport import filesystem

from protocol.queue import celery_settings, embedded_broker_url
from protocol.statuses import TRAINING_QUEUE, JobKind
from worker.embedded_broker import INCOMPLETE_SECONDS

TASK = JobKind.PREPARE_RUN.task_name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "queue"
    folder.mkdir()
    return folder


@pytest.fixture
def producer(folder: Path) -> celery.Celery:
    app = celery.Celery("producer", set_as_current=False)
    app.conf.update(celery_settings(embedded_broker_url(folder.parent)))
    return app


@pytest.fixture
def channels(producer: celery.Celery) -> Iterator[tuple[Any, Any]]:
    """Two consumers of the same folder."""
    app = celery.Celery("consumer", set_as_current=False)
    app.conf.update(producer.conf.changes, broker_transport="worker.embedded_broker:Transport")
    with app.connection() as one, app.connection() as other:
        yield one.default_channel, other.default_channel


def _take_all(channel: Any, count: int, taken: list[str], lock: threading.Lock) -> None:
    deadline = time.monotonic() + 20
    while len(taken) < count and time.monotonic() < deadline:
        try:
            message = channel._get(TRAINING_QUEUE)
        except Empty:
            continue
        with lock:
            taken.append(message["headers"]["id"])


def test_two_consumers_that_poll_without_pause_share_all_messages(producer: celery.Celery, channels: Any) -> None:
    count, taken, lock = 300, list[str](), threading.Lock()
    threads = [threading.Thread(target=_take_all, args=(channel, count, taken, lock)) for channel in channels]
    for thread in threads:
        thread.start()
    sent = [producer.send_task(TASK, args=[str(number)]).id for number in range(count)]
    for thread in threads:
        thread.join()
    assert sorted(taken) == sorted(sent)


def test_an_incomplete_message_is_left_until_its_producer_is_surely_dead(
    producer: celery.Celery, channels: Any, folder: Path
) -> None:
    producer.send_task(TASK, args=["1"])
    (message,) = folder.iterdir()
    whole = message.read_bytes()
    message.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Empty):
        channels[0]._get(TRAINING_QUEUE)
    message.write_bytes(whole)
    assert channels[0]._get(TRAINING_QUEUE)["headers"]["task"] == TASK
    message.write_bytes(b"")
    os.utime(message, times=(0, time.time() - 2 * INCOMPLETE_SECONDS))
    with pytest.raises(Empty):
        channels[0]._get(TRAINING_QUEUE)
    assert list(folder.iterdir()) == []


def test_queues_do_not_see_each_other(producer: celery.Celery, channels: Any, folder: Path) -> None:
    producer.send_task(TASK, args=["1"])
    with pytest.raises(Empty):
        channels[0]._get(f"other-{TRAINING_QUEUE}")
    assert len(list(folder.iterdir())) == 1


def test_the_stock_transport_still_needs_this(producer: celery.Celery, folder: Path) -> None:
    """When kombu reads before it takes, this fails and `worker.embedded_broker` can go."""
    producer.send_task(TASK, args=["1"])
    (message,) = folder.iterdir()
    message.write_bytes(b"")
    stock = celery.Celery("stock", set_as_current=False)
    stock.conf.update(producer.conf.changes)
    with stock.connection() as connection:
        assert isinstance(connection.default_channel, filesystem.Channel)
        with pytest.raises(ValueError, match="Expecting value"):
            connection.default_channel._get(TRAINING_QUEUE)
    assert list(folder.iterdir()) == []
