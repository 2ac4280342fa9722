"""Fixtures: the faulty cloud, a client of it, and an agent whose training takes no time."""

import random
import ssl
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from edge_agent.backoff import Backoff, Retrier
from edge_agent.cache import ArtifactCache
from edge_agent.client import CloudClient
from edge_agent.cycle import Agent
from edge_agent.ledger import Ledger
from edge_agent.local_state import LocalStates
from edge_agent.outbox import Outbox
from protocol.assignments import Assignment
from protocol.runs import EvaluationSettings
from protocol.statuses import AssignmentStatus, PartKind
from protocol.strategies import CoPlmsSettings
from tests.edge_agent.byte_trainer import ByteTrainer
from tests.edge_agent.fake_cloud import FakeCloud, running_cloud

UNUSED_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""For clients that speak plain HTTP: by default each loads the certificates of the world, which takes 20 ms."""

SHORT = httpx.Timeout(connect=1.0, read=1.0, write=1.0, pool=1.0)


@pytest.fixture
def cloud() -> Iterator[FakeCloud]:
    with running_cloud() as cloud:
        yield cloud


@pytest.fixture
def stop() -> threading.Event:
    return threading.Event()


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.jsonl", lambda: datetime.now(UTC))


@pytest.fixture
def client(cloud: FakeCloud, ledger: Ledger, stop: threading.Event) -> Iterator[CloudClient]:
    with CloudClient(
        cloud.url, "dev_1.secret", ledger, stop, now=lambda: datetime.now(UTC), tls=UNUSED_TLS, timeout=SHORT
    ) as client:
        yield client


@pytest.fixture
def trainer() -> ByteTrainer:
    return ByteTrainer()


@pytest.fixture
def agent(tmp_path: Path, client: CloudClient, stop: threading.Event, trainer: ByteTrainer) -> Agent:
    return make_agent(tmp_path, client, stop, trainer)


def make_agent(home: Path, client: CloudClient, stop: threading.Event, trainer: ByteTrainer) -> Agent:
    """An agent as `__main__` builds it, with shorter waits."""

    def new_backoff() -> Backoff:
        return Backoff(random.random, base_seconds=0.01, cap_seconds=0.05)

    retrier = Retrier(stop.wait, new_backoff)
    return Agent(
        client=client,
        retrier=retrier,
        new_backoff=new_backoff,
        stop=stop,
        cache=ArtifactCache(home / "cache", retrier.call),
        outbox=Outbox(home / "outbox"),
        states=LocalStates(home / "runs"),
        trainer=lambda: trainer,
    )


def make_assignment(cloud: FakeCloud, number: int = 1, **changes: object) -> Assignment:
    """A co_plms assignment whose artifacts the cloud holds; offered at the next poll."""
    config = cloud.add_artifact(b'{"model_type": "llama"}')
    manifest = b'{"files": [{"path": "config.json", "sha256": "%s", "size_bytes": %d}]}' % (
        config.sha256.encode(),
        config.size_bytes,
    )
    values = {
        "assignment_id": f"asg_{number}",
        "run_id": "run_1",
        "run_name": "a run",
        "round_id": f"rnd_{number}",
        "round_number": number,
        "rounds": 3,
        "status": AssignmentStatus.OFFERED,
        "strategy": CoPlmsSettings(),
        "seed": 7,
        "base_version": number - 1,
        "proxy_manifest": cloud.add_artifact(manifest),
        "adapter": cloud.add_artifact(b"adapter of round %d" % number),
        "probe_set": cloud.add_artifact(b'{"id": "p", "instruction": "q", "output": "a"}\n'),
        "uploads": [PartKind.ADAPTER_DELTA, PartKind.LOGITS],
        "upload_limits": {PartKind.ADAPTER_DELTA: 10_000_000, PartKind.LOGITS: 10_000_000},
        "evaluation": EvaluationSettings(),
        "evaluate_before": number == 1,
        "evaluate_after": True,
        "deadline_at": datetime.now(UTC) + timedelta(hours=1),
    }
    assignment = Assignment.model_validate(values | changes)
    cloud.assignments.append(assignment)
    return assignment
