"""What every stage of a run gets, and what it gives back."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy.orm import Session

from persistence.blobs import BlobStore
from persistence.database import Database
from persistence.jobs import JobRecord
from worker.leases import Lease

if TYPE_CHECKING:
    from worker.model_cache import ModelCache

Finish = Callable[[Session], None]
"""Writes a stage's whole result, in the one transaction that also ends its job."""


@dataclass(frozen=True)
class Work:
    """One claimed job and the means to do it.

    `checkpoints` is a folder of this machine for the states of trainings under way; None keeps none.
    """

    job: JobRecord
    owner: str
    database: Database
    blobs: BlobStore
    cache: "ModelCache"
    lease: Lease
    checkpoints: Path | None = None


Stage = Callable[[Work], Finish]
"""Does the heavy work of one job. Writes blobs, and nothing to the database: that is left to the `Finish`.

Raises:
    DomainError: it can never succeed; the run fails with this code and reason.
    Abandoned: from the lease; nothing is written.
"""


@dataclass
class Stopwatch:
    """Seconds by part of a stage, and the process's peak memory."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Add the block's wall-clock seconds to `part`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start
