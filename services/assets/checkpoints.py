"""Training states in a folder: one safetensors file a stage, whole or not there.

<folder>/<stage>.safetensors     the tensors; in the header as JSON: step, reported losses, and whose state it is
"""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

from assets.atomic import write_chunks_atomically
from assets.errors import TensorFileError
from assets.tensors import read_tensors, tensor_file_chunks
from cotuning.checkpoints import TrainingState

FORMAT = "cotune-checkpoint/1"


class FolderCheckpoints:
    """Implements `cotuning.checkpoints.Checkpoints`.

    Args:
        folder: made when the first state is written.
        configuration: names everything that the training depends on and its loop does not see: rows, frozen weights.
        every: steps between two states; a stage's last one is always kept.
        on_ignored: told in a sentence why a state that is there is not used. The training then starts anew.
    """

    def __init__(self, folder: Path, *, configuration: str, every: int, on_ignored: Callable[[str], None]) -> None:
        if every < 1:
            raise ValueError(f"expected a checkpoint every 1 or more steps, got {every}")
        self._folder = folder
        self._configuration = configuration
        self._every = every
        self._on_ignored = on_ignored

    def due(self, step: int, steps: int) -> bool:
        """Every so many steps, and at the end."""
        return step % self._every == 0 or step == steps

    def read(self, stage: str, fingerprint: str) -> TrainingState | None:
        """The stage's state, if it is of this training and this configuration."""
        path = self._path(stage)
        if not path.exists():
            return None
        try:
            tensors, header = read_tensors(path)
            about = json.loads(header["state"])
            received, step, reported = about["identity"], int(about["step"]), about["reported"]
            if header["format"] != FORMAT:
                raise ValueError(f"format {header['format']!r}, expected {FORMAT!r}")
        except (TensorFileError, KeyError, TypeError, ValueError) as error:
            self._on_ignored(f"{path} is no checkpoint ({error}); the stage starts anew")
            return None
        expected = self._identity(fingerprint)
        if received != expected:
            self._on_ignored(
                f"{path} belongs to another training: expected configuration {expected[:16]}, got "
                f"{str(received)[:16]}; the stage starts anew"
            )
            return None
        return TrainingState(step, tensors, reported)

    def write(self, stage: str, fingerprint: str, state: TrainingState) -> None:
        """Replace the stage's state, durably."""
        about = {"identity": self._identity(fingerprint), "step": state.step, "reported": dict(state.reported)}
        header = {"format": FORMAT, "state": json.dumps(about)}
        write_chunks_atomically(self._path(stage), tensor_file_chunks(state.tensors, header))

    def _identity(self, fingerprint: str) -> str:
        return hashlib.sha256(json.dumps([self._configuration, fingerprint]).encode()).hexdigest()

    def _path(self, stage: str) -> Path:
        if not re.fullmatch(r"[a-z0-9_]+", stage):
            raise ValueError(f"expected a stage name of lower-case letters, digits and underscores, got {stage!r}")
        return self._folder / f"{stage}.safetensors"
