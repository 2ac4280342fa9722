"""A trainer for the tests of the loop: instant, deterministic, a pure function of seed, round and starting state."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from edge_agent.cycle import RoundFiles, TrainedUpdate
from edge_agent.local_state import DOMAIN_ADAPTER, SLM_ADAPTER, LocalState, StateRecord, WriteState, write_record
from protocol.assignments import Assignment
from protocol.runs import DeviceMetrics
from protocol.strategies import spec_of

OnProgress = Callable[[str, int, int, dict[str, float]], None]


@dataclass
class ByteTrainer:
    """Implements `edge_agent.cycle.Trainer` on hashes in place of tensors."""

    during: Callable[[OnProgress], None] = lambda on_progress: on_progress("mutual_learning", 1, 1, {"slm": 1.0})
    calls: list[tuple[str, int | None]] = field(default_factory=list)

    def train(
        self, assignment: Assignment, files: RoundFiles, start: LocalState | None, on_progress: OnProgress
    ) -> TrainedUpdate:
        self.calls.append((assignment.assignment_id, start.record.round_number if start else None))
        self.during(on_progress)
        earlier = (start.slm_adapter / "psi").read_bytes() if start else b""
        adapter = files.adapter.read_bytes() if files.adapter else b""
        psi = hashlib.sha256(b"psi" + earlier + adapter + str(assignment.seed).encode()).digest()

        def write_state(folder: Path) -> None:
            (folder / SLM_ADAPTER).mkdir()
            (folder / SLM_ADAPTER / "psi").write_bytes(psi)
            (folder / DOMAIN_ADAPTER).write_bytes(b"phi" + psi)
            write_record(
                folder,
                StateRecord(
                    run_id=assignment.run_id,
                    run_name=assignment.run_name,
                    round_number=assignment.round_number,
                    assignment_id=assignment.assignment_id,
                    adapter_sha256=assignment.adapter.sha256 if assignment.adapter else None,
                    message_sha256=assignment.message.sha256 if assignment.message else None,
                    num_examples=5,
                    last_step_due=spec_of(assignment.strategy).last_step
                    and assignment.round_number == assignment.rounds,
                ),
            )

        parts = {kind: hashlib.sha256(kind.encode() + psi).digest() * 1000 for kind in assignment.uploads}
        return TrainedUpdate(parts, 5, DeviceMetrics(), write_state)

    def last_step(
        self, assignment: Assignment, files: RoundFiles, start: LocalState, on_progress: OnProgress
    ) -> WriteState:
        self.calls.append(("last step", start.record.round_number))
        self.during(on_progress)
        assert files.message is not None
        learnt = (start.slm_adapter / "psi").read_bytes() + files.message.read_bytes()

        def write_state(folder: Path) -> None:
            (folder / SLM_ADAPTER).mkdir()
            (folder / SLM_ADAPTER / "psi").write_bytes(learnt)
            record = start.record.model_copy(update={"round_number": assignment.round_number, "last_step_due": False})
            write_record(folder, record)

        return write_state
