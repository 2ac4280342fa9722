"""A small cloud: a real database, a real blob store, a worker in this process, and devices that do their real part."""

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from assets.data import examples_to_jsonl
from assets.models import load_language_model
from assets.tensors import tensors_to_bytes
from cotuning.adapters import adapted, lora_config
from cotuning.examples import Example
from cotuning.language_model import LanguageModel
from cotuning.probe_logits import probe_payload
from cotuning.strategies import co_plms
from cotuning.strategies.interface import DeviceInputs
from persistence import assignments, enrolment, events, rounds, runs, updates, versions
from persistence.blobs import BlobStore, FolderBlobStore
from persistence.clock import utc_now
from persistence.database import Database, JobMessage
from protocol.assignments import Assignment, ModelManifest, Part, Submission
from protocol.devices import DeviceProfile, EnrolmentRequest, EnrolmentTokenCreate
from protocol.events import Event
from protocol.runs import DeviceMetrics, ModelVersion, Round, Run, RunCreate
from protocol.statuses import AssignmentStatus, PartKind
from protocol.strategies import CoPlmsSettings
from tests.tiny_models import tiny_examples, tiny_language_model
from worker.adapter_files import get_adapter
from worker.row_files import get_rows
from worker.settings import Settings
from worker.tasks import JobRunner

LIMITS = dict.fromkeys(PartKind, 10_000_000)
PROFILE = DeviceProfile(
    agent_version="0.1.0",
    platform="Linux x86_64",
    cpu_count=2,
    memory_bytes=4_000_000_000,
    model_name="tiny",
    model_architecture="gpt2",
    model_parameters=1000,
    tokenizer_kind="byte-level BPE, 300 tokens",
    num_examples=8,
)
LORA = {"rank": 2, "alpha": 4}
STRATEGY: dict[str, Any] = {
    "name": "co_plms",
    "slm_lora": LORA,
    "proxy_lora": LORA,
    "llm_lora": LORA,
    "training": {"steps": 2, "batch_size": 4, "max_length": 64},
    "domain_steps": 1,
    "top_k": 8,
    "server": {"steps": 2, "batch_size": 4, "max_length": 64},
}
ALIGNED = {"coverage": 0.95, "class_agreement": 0.9, "num_spans": 100, "skipped_rows": 0}
Answer = TypeVar("Answer")


def write_rows(path: Path, rows: Sequence[Example]) -> str:
    path.write_bytes(examples_to_jsonl(rows))
    return str(path)


class Cloud:
    """The server's side in `settings.home`, and devices that speak to its database as the API would."""

    def __init__(
        self,
        settings: Settings,
        *,
        dispatch: Callable[[JobMessage], None] | None = None,
        blobs: BlobStore | None = None,
    ) -> None:
        """`blobs`: where the files are; by default the settings' folder."""
        self.settings = settings
        self.sent: list[str] = []
        self.blobs: Any = blobs or FolderBlobStore(settings.blobs)
        self.database = Database(
            settings.database_url,
            dispatch or (lambda message: self.sent.append(message.job_id)),
            stored=self.blobs.exists,
        )
        self.runner = self.make_runner("worker-1")

    def make_runner(self, owner: str) -> JobRunner:
        return JobRunner(self.settings, self.database, self.blobs, owner, threading.Event())

    def call(self, function: Callable[..., Answer], *arguments: Any, **named: Any) -> Answer:
        with self.database.transaction() as session:
            return function(session, *arguments, **named)

    def read(self, function: Callable[..., Answer], *arguments: Any, **named: Any) -> Answer:
        with self.database.reading() as session:
            return function(session, *arguments, **named)

    def work(self) -> None:
        """Do the jobs that were sent, and those that they lead to."""
        while self.sent:
            self.runner.run(self.sent.pop(0))

    def create_run(self, llm: str | None, *, strategy: Mapping[str, Any] | None = None, **values: Any) -> Run:
        """Create a run; `strategy` changes settings of Co-PLMs, or is another one if it has a name."""
        folder = self.settings.home
        strategy = strategy or {}
        defaults: dict[str, Any] = {
            "name": "run",
            "strategy": strategy if "name" in strategy else {**STRATEGY, **strategy},
            "rounds": 1,
            "llm": llm,
            "public_data": write_rows(folder / "public.jsonl", tiny_examples(24)),
            "probe_rows": 4,
            "proxy": {"layers": 1, "steps": 2, "batch_size": 4, "max_length": 64},
            "evaluation": {"validation_rows": 4, "test_rows": 3, "max_new_tokens": 4},
            "grace_seconds": 0,
            "seed": 7,
        }
        return self.call(runs.create_run, RunCreate.model_validate({**defaults, **values}), utc_now())

    def enrol(self, *names: str) -> list[str]:
        token = self.call(enrolment.create_token, EnrolmentTokenCreate(uses=len(names)), utc_now()).token
        requests = [EnrolmentRequest(token=token, name=name, profile=PROFILE) for name in names]
        return [self.call(enrolment.enrol, request, utc_now()).device_id for request in requests]

    def take(self, device_id: str) -> Assignment:
        assignment = self.call(assignments.next_assignment, device_id, utc_now(), LIMITS)
        assert assignment is not None
        return assignment

    def deliver(
        self,
        assignment: Assignment,
        device_id: str,
        parts: Mapping[PartKind, bytes],
        *,
        num_examples: int = 8,
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        """Upload and submit, as the API does it."""
        named = []
        for kind, content in parts.items():
            blob = self.blobs.put_bytes(content)
            self.call(updates.record_part, device_id, assignment.assignment_id, kind, blob.sha256, blob.size, utc_now())
            named.append(Part(kind=kind, sha256=blob.sha256, size_bytes=blob.size))
        submission = Submission(
            base_sha256=assignment.adapter.sha256 if assignment.adapter else None,
            num_examples=num_examples,
            parts=named,
            metrics=DeviceMetrics.model_validate({"alignment": ALIGNED, **(metrics or {})}),
        )
        self.call(updates.submit, device_id, assignment.assignment_id, submission, utc_now())

    def untrained_update(
        self, assignment: Assignment, *, seed: int = 0, scale: float = 1e-3
    ) -> dict[PartKind, dict[str, Tensor]]:
        """The tensors of an update whose delta is random and whose logits are the proxy's own."""
        proxy, probe, shared = self.for_device(assignment)
        settings = assignment.strategy
        assert isinstance(settings, CoPlmsSettings)
        generator = torch.Generator().manual_seed(seed)
        delta = {name: scale * torch.randn(tensor.shape, generator=generator) for name, tensor in shared.items()}
        config = lora_config(proxy, **settings.proxy_lora.model_dump())
        with adapted(proxy, config, {"shared": shared}) as lent:
            logits, self.logits_metadata = probe_payload(
                lent, probe, top_k=settings.top_k, temperature=settings.temperature, max_length=64
            )
        return {PartKind.ADAPTER_DELTA: delta, PartKind.LOGITS: logits}

    def as_parts(self, tensors: Mapping[PartKind, Mapping[str, Tensor]]) -> dict[PartKind, bytes]:
        return {
            kind: tensors_to_bytes(each, self.logits_metadata if kind is PartKind.LOGITS else {})
            for kind, each in tensors.items()
        }

    def deliver_untrained(self, device_id: str, *, seed: int = 0, **values: Any) -> Assignment:
        assignment = self.take(device_id)
        self.deliver(assignment, device_id, self.as_parts(self.untrained_update(assignment, seed=seed)), **values)
        return assignment

    def train(self, device_id: str, slm: str) -> Assignment:
        """Take an assignment and do it with the real strategy."""
        assignment = self.take(device_id)
        proxy, probe, shared = self.for_device(assignment)
        assert isinstance(assignment.strategy, CoPlmsSettings)
        given = DeviceInputs(
            slm=tiny_language_model(slm),
            private=tiny_examples(8, start=100, kind="sum"),
            slm_adapter=None,
            round_number=assignment.round_number,
            seed=assignment.seed,
            on_progress=lambda *_: None,
            shared_model=proxy,
            shared_adapter=shared,
            probe=probe,
        )
        result = co_plms.device_step(given, assignment.strategy)
        assert result.alignment is not None
        self.logits_metadata = result.logits_metadata
        parts = self.as_parts({PartKind.ADAPTER_DELTA: result.delta, PartKind.LOGITS: result.logits})
        metrics = {"losses": result.losses, "alignment": vars(result.alignment)}
        self.deliver(assignment, device_id, parts, num_examples=result.num_examples, metrics=metrics)
        return assignment

    def for_device(self, assignment: Assignment) -> tuple[LanguageModel, list[Example], dict[str, Tensor]]:
        """What a device downloads: the proxy, the probe set, theta."""
        assert assignment.proxy_manifest is not None
        assert assignment.probe_set is not None
        assert assignment.adapter is not None
        folder = self.settings.home / f"device-{assignment.proxy_manifest.sha256[:12]}"
        with self.blobs.open(assignment.proxy_manifest.sha256) as file:
            manifest = ModelManifest.model_validate_json(file.read())
        folder.mkdir(exist_ok=True)
        for each in manifest.files:
            with self.blobs.open(each.sha256) as source:
                (folder / each.path).write_bytes(source.read())
        probe = get_rows(self.blobs, assignment.probe_set.sha256)
        return load_language_model(folder), probe, get_adapter(self.blobs, assignment.adapter.sha256)

    def run(self, run_id: str) -> Run:
        return self.read(runs.get_run, run_id)

    def round(self, run_id: str, number: int = 1) -> Round:
        return self.read(rounds.get_round, run_id, number)

    def statuses(self, run_id: str, number: int = 1) -> list[AssignmentStatus]:
        return [device.status for device in self.round(run_id, number).devices]

    def version(self, run_id: str, number: int) -> ModelVersion:
        return self.read(versions.get_version, run_id, number)

    def events(self, run_id: str) -> list[Event]:
        return self.read(events.list_events, run_id=run_id, after=0, limit=10_000)
