"""The run's rows as files of the blob store, so that it goes on whatever becomes of the user's files."""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from assets.data import examples_to_jsonl, read_examples
from cotuning.examples import Example
from persistence.blobs import BlobStore, StoredBlob
from protocol.runs import ModelVersion

ROWS = "rows"
"""Key in version 0's metrics."""


@dataclass(frozen=True)
class RowFiles:
    """Hashes of the rows that only the worker needs; the probe set is the run's own and known to every device."""

    training: str
    validation: str
    test: str | None

    def as_json(self) -> dict[str, str | None]:
        """As version 0's metrics hold it."""
        return asdict(self)

    @classmethod
    def of(cls, version: ModelVersion) -> "RowFiles | None":
        """The files that version 0 of a run names; None where the run has no public rows."""
        named = version.metrics.get(ROWS)
        return None if named is None else cls(**named)


def put_rows(blobs: BlobStore, rows: Sequence[Example]) -> StoredBlob:
    """Store rows as JSON lines."""
    return blobs.put_bytes(examples_to_jsonl(rows))


def get_rows(blobs: BlobStore, sha256: str) -> list[Example]:
    """Read rows that `put_rows` stored, in their order."""
    with tempfile.TemporaryDirectory(prefix="cotune-rows-") as name:
        path = Path(name) / "rows.jsonl"  # the reader goes by the suffix
        with blobs.local(sha256) as source:
            shutil.copyfile(source, path)
        return read_examples(path)
