"""The job queue as data: broker address -> Celery configuration, and the names of the queues.

The API (which only sends) and the worker (which consumes) configure Celery from the same dictionary, so they cannot
disagree about a queue's name. Pure data: nothing here imports Celery or touches the disk.

Two brokers are supported. `redis://` and `rediss://` for deployments; `filesystem:///folder` where no server is wanted:
each message is one file in that folder (kombu's filesystem transport), looked for by polling. Every queue is bound to
the anonymous exchange, so that kombu keeps no exchange table on disk (it truncates that file before it locks it, and
two processes that start together could read it empty).
"""

import re
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from protocol.statuses import TRAINING_QUEUE, JobKind

POLLING_SECONDS = 0.1
"""How often a consumer of the embedded broker looks into its folder; bounds the delay of a job's start."""

REDIS_VISIBILITY_SECONDS = 3600
"""Redis delivers an unacknowledged message again after this; harmless, since a job is claimed by lease."""

_PREFIX = re.compile(r"^[A-Za-z0-9_-]{0,64}$")


def embedded_broker_url(home: Path) -> str:
    """Return the address of the broker that needs no server: a folder under `home`, an absolute path."""
    return f"filesystem://{quote(str(home / 'queue'))}"


def queue_folder(broker_url: str) -> Path | None:
    """Return the folder that an embedded broker keeps its messages in, or None for a broker that is a server.

    Whoever opens the broker creates the folder first: Celery does not.

    Raises:
        ValueError: a scheme that is not supported, or a filesystem address without an absolute folder.
    """
    parts = urlsplit(broker_url)
    if parts.scheme in {"redis", "rediss"}:
        return None
    if parts.scheme != "filesystem":
        raise ValueError(f"expected a broker address redis://, rediss:// or filesystem:///folder, got {broker_url!r}")
    if parts.netloc or not parts.path.startswith("/"):
        raise ValueError(f"expected filesystem:/// and an absolute folder, got {broker_url!r}")
    return Path(unquote(parts.path))


def queue_name(queue: str, prefix: str = "") -> str:
    """Return the broker's name of `queue` (`TRAINING_QUEUE`) under `prefix`.

    Raises:
        ValueError: a prefix with other characters than letters, digits, `_` and `-`, or over 64 of them.
    """
    if not _PREFIX.match(prefix):
        raise ValueError(f"expected a queue prefix of letters, digits, `_`, `-`, at most 64, got {prefix!r}")
    return f"{prefix}{queue}"


def celery_settings(broker_url: str, queue_prefix: str = "") -> dict[str, Any]:
    """Return Celery's configuration (`app.conf.update(...)`) for a broker address and a prefix of all queue names.

    Send with `app.send_task(JobKind.X.task_name, args=[job_id])`: the routes choose the queue. Messages are JSON and
    hold ids only; results are never stored.

    Raises:
        ValueError: see `queue_folder` and `queue_name`.
    """
    training = queue_name(TRAINING_QUEUE, queue_prefix)
    folder = queue_folder(broker_url)
    return {
        "broker_url": broker_url if folder is None else "filesystem://localhost",
        "broker_transport_options": _redis_options(queue_prefix) if folder is None else _folder_options(folder),
        "broker_connection_retry_on_startup": True,
        "task_queues": {training: {"exchange": "", "routing_key": training}},
        "task_default_queue": training,
        "task_default_exchange": "",
        "task_default_routing_key": training,
        "task_create_missing_queues": False,
        "task_routes": {kind.task_name: {"queue": training} for kind in JobKind},
        # The sweep sends again what could not be sent: a request must not wait for a broker that is down.
        "task_publish_retry": False,
        "task_serializer": "json",
        "accept_content": ["json"],
        "task_ignore_result": True,
        "result_backend": None,
        "enable_utc": True,
        "timezone": "UTC",
    }


def _folder_options(folder: Path) -> dict[str, Any]:
    return {
        "data_folder_in": str(folder),
        "data_folder_out": str(folder),
        "control_folder": str(folder / "control"),
        "polling_interval": POLLING_SECONDS,
    }


def _redis_options(queue_prefix: str) -> dict[str, Any]:
    options: dict[str, Any] = {
        "visibility_timeout": REDIS_VISIBILITY_SECONDS,
        "socket_connect_timeout": 3,
        "socket_keepalive": True,
    }
    # kombu's own keys (unacked messages, bindings) carry no queue name: they need the prefix too.
    return {**options, "global_keyprefix": queue_prefix} if queue_prefix else options
