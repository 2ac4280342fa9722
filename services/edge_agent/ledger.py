"""The ledger: every body that left this device, one line each, append-only.

A line is written and, for updates, made durable *before* the bytes go out, so nothing can leave unlisted; an attempt
that failed half-way is listed too, as bytes may have left. It holds sizes and hashes, never contents.
"""

import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path


@dataclass(frozen=True)
class Purpose:
    """Why something is sent: its kind, and the assignment it belongs to if any."""

    kind: str
    run_id: str | None = None
    round_number: int | None = None
    assignment_id: str | None = None


@dataclass(frozen=True)
class LedgerEntry:
    """One body."""

    time: str
    kind: str
    size_bytes: int
    sha256: str
    run_id: str | None
    round_number: int | None
    assignment_id: str | None


class Ledger:
    """Appends to and reads `ledger.jsonl`."""

    def __init__(self, path: Path, now: Callable[[], datetime]) -> None:
        self._path = path
        self._now = now
        self._lock = threading.Lock()
        self._end_torn_line()

    def record(self, purpose: Purpose, size_bytes: int, sha256: str, *, durable: bool) -> None:
        """Append one line; `durable` waits until it is on disk."""
        entry = LedgerEntry(time=self._now().isoformat(), size_bytes=size_bytes, sha256=sha256, **asdict(purpose))
        line = json.dumps(asdict(entry)) + "\n"
        with self._lock:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                os.write(descriptor, line.encode())
                if durable:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def entries(self) -> Iterator[LedgerEntry]:
        """Yield every entry, oldest first; a line cut short by a power failure is passed over."""
        if not self._path.exists():
            return
        with open(self._path, encoding="utf-8") as file:
            for line in file:
                try:
                    yield LedgerEntry(**json.loads(line))
                except (ValueError, TypeError):
                    continue

    def totals(self) -> dict[str, int]:
        """Return bytes by kind."""
        totals: dict[str, int] = {}
        for entry in self.entries():
            totals[entry.kind] = totals.get(entry.kind, 0) + entry.size_bytes
        return totals

    def _end_torn_line(self) -> None:
        # A power failure can cut the last line; the next one must not be glued to it.
        if self._path.exists() and self._path.stat().st_size:
            with open(self._path, "rb+") as file:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
