"""What stays on the device: the SLM's adapter psi and the proxy's domain adapter phi, by run and round.

    runs/<run id>/rounds/<round>/slm_adapter/        peft's own format: `PeftModel.from_pretrained(slm, <this folder>)`
    runs/<run id>/rounds/<round>/domain_adapter.safetensors
    runs/<run id>/rounds/<round>/state.json          what it was trained from
    runs/<run id>/training/<assignment id>/          checkpoints of the training under way; see `assets.checkpoints`

A round's state becomes current only when the server has its update, so a repeated round always starts from the same
place: the newest state of an earlier round. A step after the last round leaves a state like one more round's.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from assets.atomic import write_atomically
from edge_agent import durable

SLM_ADAPTER = "slm_adapter"
DOMAIN_ADAPTER = "domain_adapter.safetensors"
STATE_FILE = "state.json"
KEPT_ROUNDS = 2
"""The current state and the one before it: a repetition of the newest round starts from the latter."""


WriteState = Callable[[Path], None]
"""Writes a local state into the folder it is given."""


class StateRecord(BaseModel):
    """`state.json`."""

    run_id: str
    run_name: str
    round_number: int
    assignment_id: str
    adapter_sha256: str | None
    message_sha256: str | None = None
    num_examples: int
    last_step_due: bool = False
    """Once the run is completed, its last message is to be learnt from."""

    @property
    def files(self) -> set[str]:
        """What was downloaded for this round alone."""
        return {sha256 for sha256 in (self.adapter_sha256, self.message_sha256) if sha256 is not None}


@dataclass(frozen=True)
class LocalState:
    """One round's state on disk."""

    folder: Path
    record: StateRecord

    @property
    def slm_adapter(self) -> Path:
        """The folder of psi, in peft's format."""
        return self.folder / SLM_ADAPTER

    @property
    def domain_adapter(self) -> Path | None:
        """The file of phi, if the strategy has one."""
        path = self.folder / DOMAIN_ADAPTER
        return path if path.exists() else None


class LocalStates:
    """Every run's states."""

    def __init__(self, folder: Path) -> None:
        """Only looking changes nothing on disk, so that others than the agent itself may look."""
        self._folder = folder

    def before(self, run_id: str, round_number: int) -> LocalState | None:
        """Return the newest state of a round earlier than `round_number`; None before the first."""
        return next((state for state in self._newest_first(run_id) if state.record.round_number < round_number), None)

    def newest(self) -> list[LocalState]:
        """Return the current state of every run."""
        states = (next(self._newest_first(run.name), None) for run in sorted(durable.finished(self._folder)))
        return [state for state in states if state]

    def adopt(self, staged: Path) -> list[StateRecord]:
        """Make the state in the folder `staged` its round's, and return the records of those that it replaced.

        Doing it again after a crash in between is harmless.
        """
        if not staged.exists():
            return []
        record = _read(staged)
        rounds = self._rounds(record.run_id)
        rounds.mkdir(parents=True, exist_ok=True)
        durable.sweep(rounds)
        target = rounds / f"{record.round_number:06d}"
        if target.exists():
            durable.remove(target)
        durable.move(staged, target)
        outdated = list(self._newest_first(record.run_id))[KEPT_ROUNDS:]
        for state in outdated:
            durable.remove(state.folder)
        return [state.record for state in outdated]

    def settle(self, state: LocalState, write_state: WriteState | None) -> None:
        """End a run for this device: with a state after its last round's, or with that as it is.

        Args:
            state: of the last round.
            write_state: writes the new one; None: there is none.
        """
        if write_state is None:
            settled = state.record.model_copy(update={"last_step_due": False})
            write_atomically(state.folder / STATE_FILE, settled.model_dump_json(indent=1).encode())
            return
        target = state.folder.with_name(f"{state.record.round_number + 1:06d}")
        temporary = target.with_name(target.name + durable.UNFINISHED)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        write_state(temporary)
        durable.publish(temporary, target)

    def begin_training(self, run_id: str, assignment_id: str) -> Path:
        """Return the folder for this training's checkpoints; whatever other trainings left behind is removed."""
        folder = self._training(run_id) / durable.folder_name(assignment_id)
        for other in self._folder.glob("*/training/*"):
            if other != folder:
                shutil.rmtree(other)
        return folder

    def end_training(self, run_id: str) -> None:
        """Forget the checkpoints: the update that they led to is stored."""
        shutil.rmtree(self._training(run_id), ignore_errors=True)

    def _training(self, run_id: str) -> Path:
        return self._folder / durable.folder_name(run_id) / "training"

    def _newest_first(self, run_id: str) -> Iterator[LocalState]:
        for folder in sorted(durable.finished(self._rounds(run_id)), reverse=True):
            yield LocalState(folder, _read(folder))

    def _rounds(self, run_id: str) -> Path:
        return self._folder / durable.folder_name(run_id) / "rounds"


def write_record(folder: Path, record: StateRecord) -> None:
    """Write `state.json` into a state that is being put together."""
    (folder / STATE_FILE).write_text(record.model_dump_json(indent=1), encoding="utf-8")


def _read(folder: Path) -> StateRecord:
    return StateRecord.model_validate_json((folder / STATE_FILE).read_bytes())
