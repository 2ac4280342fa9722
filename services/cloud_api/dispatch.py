"""Sends jobs to the queue, by task name and with ids only, after the commit that queued them.

One thread of its own sends, so that no request waits for a broker that does not answer. What cannot be sent is logged
and no more: the job is in the database, and the sweep sends it again.
"""

from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from functools import cached_property
from typing import TYPE_CHECKING

import structlog

from persistence.database import JobMessage
from protocol.queue import celery_settings

if TYPE_CHECKING:
    import celery

log = structlog.get_logger(__name__)

CHECK_SECONDS = 3.0
_ONE_ATTEMPT = {"max_retries": 1, "interval_start": 0.0, "interval_step": 0.0, "interval_max": 0.0}


class Dispatcher:
    """The sending half of the job queue."""

    def __init__(self, broker_url: str, queue_prefix: str) -> None:
        self._settings = celery_settings(broker_url, queue_prefix)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="dispatch")

    def send(self, message: JobMessage) -> None:
        """Send a job's message soon. Returns at once; never raises for a broker's sake."""
        self._thread.submit(self._send, message)

    def check(self) -> str:
        """Return `ok`, or in words why the broker cannot be reached."""
        try:
            return self._thread.submit(self._check).result(CHECK_SECONDS)
        except FutureTimeout:
            return f"no answer within {CHECK_SECONDS:.0f} s"

    def warm_up(self) -> None:
        """Load Celery now, so that the first job need not wait for it. Returns at once."""
        self._thread.submit(lambda: self._app)

    def close(self) -> None:
        """Stop sending. What is not sent yet is left to the sweep."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    @cached_property
    def _app(self) -> "celery.Celery":
        import celery  # slow to load, and only this thread needs it

        app = celery.Celery("cotune", set_as_current=False)
        app.conf.update(self._settings)
        # One failed attempt to connect is enough: kombu would try for seconds while other jobs and `check` wait.
        app.conf.broker_transport_options = {**self._settings["broker_transport_options"], **_ONE_ATTEMPT}
        return app

    def _send(self, message: JobMessage) -> None:
        try:
            self._app.send_task(message.kind.task_name, args=[message.job_id])
        except Exception as error:  # whatever the broker's library raises; the queue is a hint
            log.warning("job_not_sent", job_id=message.job_id, kind=message.kind.value, error=str(error)[:200])
        else:
            log.info("job_sent", job_id=message.job_id, kind=message.kind.value)

    def _check(self) -> str:
        try:
            with self._app.connection_for_write() as connection:
                connection.ensure_connection(max_retries=1, interval_start=0, timeout=CHECK_SECONDS)
        except Exception as error:  # as above
            return f"{type(error).__name__}: {error}"[:200]
        return "ok"
