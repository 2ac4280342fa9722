"""A device for the chaos: the real agent's loop, outbox and client around a trainer that trains nothing.

The update is a pure function of the device's number and the round, so that a run with faults can be compared with one
without, bit for bit. No torch, so that devices start at once and may be killed too. Requests are signed; some devices
send even their small files in chunks.
"""

import hashlib
import json
import math
import random
import struct
import threading
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edge_agent import loop
from edge_agent.backoff import Backoff, Retrier
from edge_agent.cache import ArtifactCache
from edge_agent.client import CloudClient
from edge_agent.cycle import Agent, RoundFiles, TrainedUpdate
from edge_agent.errors import CannotTrain
from edge_agent.ledger import Ledger
from edge_agent.local_state import DOMAIN_ADAPTER, SLM_ADAPTER, LocalState, LocalStates, StateRecord, write_record
from edge_agent.outbox import Outbox
from edge_agent.signing import make_key
from edge_agent.uploading import AT_ONCE_BYTES
from protocol.assignments import Assignment, AssignmentProgress
from protocol.devices import DeviceProfile
from protocol.headers import ADAPTER_FORMAT, METADATA_BASE, METADATA_FORMAT, METADATA_PROXY
from protocol.runs import DeviceMetrics
from protocol.safetensors_header import TensorInfo, read_header
from protocol.statuses import AssignmentStatus, PartKind

PROFILE = DeviceProfile(
    agent_version="0.1.0",
    platform="Linux x86_64",
    cpu_count=2,
    memory_bytes=4_000_000_000,
    model_name="none",
    model_architecture="gpt2",
    model_parameters=1000,
    tokenizer_kind="byte-level BPE, 300 tokens",
    num_examples=8,
)
ALIGNED = {"coverage": 0.95, "class_agreement": 0.9, "num_spans": 100, "skipped_rows": 0}
DELTA_SIZE = 1e-3
"""Standard deviation of a delta's values."""

HOLD, REFUSE = "hold", "refuse"
"""What a gate's file says: do not finish training while it is there; refuse the assignment."""

GATE_SECONDS = 0.02

OnProgress = Callable[[str, int, int, dict[str, float]], None]


def read_tensor_infos(content: bytes) -> dict[str, TensorInfo]:
    """Return the tensors that a safetensors file declares."""
    import io

    return read_header(io.BytesIO(content), len(content)).tensors


def write_safetensors(tensors: dict[str, TensorInfo], data: bytes, metadata: dict[str, str]) -> bytes:
    """Write float32 tensors that lie in `data` one after the other, by the format's published layout."""
    header: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    for name, info in tensors.items():
        end = position + 4 * math.prod(info.shape)
        header[name] = {"dtype": "F32", "shape": list(info.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def delta(assignment: Assignment, adapter: bytes, number: int) -> bytes:
    """Return device `number`'s delta for a round: Gaussian noise that depends on both and on nothing else."""
    assert assignment.adapter is not None
    assert assignment.proxy_manifest is not None
    tensors = read_tensor_infos(adapter)
    noise = random.Random(f"{number} {assignment.round_number}")
    count = sum(math.prod(info.shape) for info in tensors.values())
    values = array("f", (noise.gauss(0, DELTA_SIZE) for _ in range(count)))
    metadata = {
        METADATA_FORMAT: ADAPTER_FORMAT,
        METADATA_BASE: assignment.adapter.sha256,
        METADATA_PROXY: assignment.proxy_manifest.sha256,
    }
    return write_safetensors(tensors, values.tobytes(), metadata)


def gate_path(folder: Path, number: int, run_name: str, round_number: int, base_version: int) -> Path:
    """Return the file that holds device `number` back in a round, as long as it is there."""
    return folder / f"{run_name}, device {number}, round {round_number} from version {base_version}"


def num_examples(number: int) -> int:
    """Return n_i of a device: each has another, so that a wrong weight shows."""
    return 8 + number


@dataclass
class NoiseTrainer:
    """Implements `edge_agent.cycle.Trainer`.

    Args:
        report: tells the cloud of progress, as the real trainer's reporter does after a second.
        number: of the device.
        logits: a file of probe logits that fits every round's proxy and probe set.
        gates: the folder of the gates' files.
    """

    report: Callable[[Assignment], None]
    number: int
    logits: Path
    gates: Path

    def train(
        self, assignment: Assignment, files: RoundFiles, start: LocalState | None, on_progress: OnProgress
    ) -> TrainedUpdate:
        """Return the device's update for the round."""
        self.report(assignment)
        on_progress("mutual_learning", 1, 1, {"slm": 1.0})
        self._wait_at_gate(assignment, on_progress)
        assert files.adapter is not None
        parts = {
            PartKind.ADAPTER_DELTA: delta(assignment, files.adapter.read_bytes(), self.number),
            PartKind.LOGITS: self.logits.read_bytes(),
        }

        def write_state(folder: Path) -> None:
            (folder / SLM_ADAPTER).mkdir()
            (folder / DOMAIN_ADAPTER).write_bytes(hashlib.sha256(parts[PartKind.ADAPTER_DELTA]).digest())
            record = StateRecord(
                run_id=assignment.run_id,
                run_name=assignment.run_name,
                round_number=assignment.round_number,
                assignment_id=assignment.assignment_id,
                adapter_sha256=assignment.adapter.sha256 if assignment.adapter else None,
                num_examples=num_examples(self.number),
            )
            write_record(folder, record)

        metrics = DeviceMetrics.model_validate({"alignment": ALIGNED})
        return TrainedUpdate(parts, num_examples(self.number), metrics, write_state)

    def _wait_at_gate(self, assignment: Assignment, on_progress: OnProgress) -> None:
        gate = gate_path(self.gates, self.number, assignment.run_name, assignment.round_number, assignment.base_version)
        while gate.exists():
            if gate.read_text(encoding="ascii") == REFUSE:
                raise CannotTrain("training_failed", "as the chaos wants it")
            on_progress("mutual_learning", 1, 1, {"slm": 1.0})
            time.sleep(GATE_SECONDS)


def main(arguments: list[str]) -> int:
    """Work for ever: `<home> <server> <credential> <number> <logits> <gates> <largest file sent at once>`."""
    folder, server, credential, number, logits, gates, *limit = arguments
    home, stop = Path(folder), threading.Event()
    home.mkdir(parents=True, exist_ok=True)

    def now() -> datetime:
        return datetime.now(UTC)

    def new_backoff() -> Backoff:
        return Backoff(random.random, base_seconds=0.1, cap_seconds=0.5)

    states = LocalStates(home / "runs")
    ledger = Ledger(home / "ledger.jsonl", now)
    with CloudClient(server, credential, ledger, stop, now=now, signing_key=make_key(home)) as client:
        retrier = Retrier(stop.wait, new_backoff)

        def report(assignment: Assignment) -> None:
            progress = AssignmentProgress(status=AssignmentStatus.TRAINING, stage="mutual_learning", step=1, steps=1)
            retrier.call("progress", lambda: client.report_progress(assignment, progress))

        trainer = NoiseTrainer(report, int(number), Path(logits), Path(gates))
        agent = Agent(
            client=client,
            retrier=retrier,
            new_backoff=new_backoff,
            stop=stop,
            cache=ArtifactCache(home / "cache", retrier.call),
            outbox=Outbox(home / "outbox"),
            states=states,
            trainer=lambda: trainer,
            at_once_bytes=int(limit[0]) if limit else AT_ONCE_BYTES,
        )
        loop.run(agent, PROFILE)
    return 0
