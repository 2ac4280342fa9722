"""Sending jobs: by name, with ids, and never at the expense of a request."""

import base64
import json
import time
from pathlib import Path

from cloud_api.dispatch import Dispatcher
from persistence.database import JobMessage
from protocol.queue import embedded_broker_url, queue_folder
from protocol.statuses import JobKind
from tests.cloud_api.running_api import eventually

MESSAGE = JobMessage("job_1", JobKind.AGGREGATE_ROUND)
NOBODY = "redis://127.0.0.1:1/0"


def test_a_message_names_the_task_and_holds_the_id_only(tmp_path: Path) -> None:
    url = embedded_broker_url(tmp_path)
    folder = queue_folder(url)
    assert folder is not None
    folder.mkdir()
    dispatcher = Dispatcher(url, "test-")
    dispatcher.send(MESSAGE)
    eventually(lambda: any(path.stat().st_size for path in folder.glob("*.msg")))
    [path] = folder.glob("*.msg")
    assert "test-cotune-training" in path.name
    message = json.loads(path.read_text())
    assert message["headers"]["task"] == "cotune.aggregate_round"
    assert json.loads(base64.b64decode(message["body"]))[0] == ["job_1"]
    assert dispatcher.check() == "ok"
    dispatcher.close()


def test_a_broker_that_does_not_answer_delays_nobody_and_is_named() -> None:
    dispatcher = Dispatcher(NOBODY, "")
    started = time.monotonic()
    for _ in range(3):
        dispatcher.send(MESSAGE)
    assert time.monotonic() - started < 0.5
    assert dispatcher.check() != "ok"
    dispatcher.close()
