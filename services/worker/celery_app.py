"""The worker's Celery application: what `protocol.queue` says, and how a process consumes one queue.

The message queue is a hint (see `persistence.jobs`), so everything of Celery that keeps state elsewhere is off: no
results, no events, no remote control, no gossip between workers. Pool `solo`: CUDA does not survive a fork, and a job
gets the whole machine.
"""

from collections.abc import Callable
from typing import Any

import celery
import structlog
from celery import signals
from celery.worker import request, state

from persistence.database import JobMessage
from protocol.queue import celery_settings, queue_folder, queue_name
from worker.settings import Settings


class Request(request.Request):  # type: ignore[misc]
    """A task's message, whose acknowledgement may fail aloud.

    Celery logs an acknowledgement that did not reach the broker and goes on; but with Redis the failed attempt has
    closed the connection on which the process waits for messages, and it then waits for ever, alive and idle. Raised,
    the error ends in Celery's own code for a lost connection, which connects again.
    """

    acknowledged: bool

    def acknowledge(self) -> None:
        """Tell the broker that the message is dealt with. Raises what its library raises when it is away."""
        if not self.acknowledged:
            self.message.ack()
            self.acknowledged = True


class Task(celery.Task):  # type: ignore[misc]
    """Every task of the worker."""

    Request = Request


def make_app(settings: Settings) -> celery.Celery:
    """Return the application, without tasks."""
    app = celery.Celery("cotune", set_as_current=False, task_cls=Task)
    app.conf.update(celery_settings(settings.broker_url, settings.queue_prefix))
    if queue_folder(settings.broker_url) is not None:
        app.conf.broker_transport = "worker.embedded_broker:Transport"
    app.conf.update(
        worker_prefetch_multiplier=1,
        task_acks_late=True,
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
    )
    return app


def sender(app: celery.Celery) -> Callable[[JobMessage], None]:
    """Return what sends a job's message; the routes choose the queue. It raises when the broker is away."""

    def send(message: JobMessage) -> None:
        app.send_task(message.kind.task_name, args=[message.job_id])

    return send


def consume(app: celery.Celery, queue: str, settings: Settings, node: str) -> int:
    """Run tasks from `queue` in this thread until `request_stop`; return the process's exit code."""
    # Connected handlers switch off Celery's own set-up of logging.
    signals.setup_logging.connect(_keep_logging, weak=False)
    worker: Any = app.Worker(
        hostname=node,
        pool="solo",
        concurrency=1,
        queues=[queue_name(queue, settings.queue_prefix)],
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
        quiet=True,
    )
    structlog.get_logger("worker.celery_app").info("consuming", queue=queue, node=worker.hostname)
    worker.start()
    return int(worker.exitcode or 0)


def request_stop(exit_code: int = 0) -> None:
    """Let `consume` end with this code after the current task; within two seconds when there is none."""
    state.should_stop = exit_code


def _keep_logging(**_: Any) -> None:
    """Logging is configured by `worker.logging`."""
