"""Results of runs in a folder, so that an interrupted benchmark goes on where it was.

<folder>/<hash of the configuration>/<strategy>-seed<seed>-<checkpoint>.json

A file is written whole or not at all and names the run that it is of. What cannot be the result of that run is refused
with an error, never half-read, and never taken away silently: it may be somebody's.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from assets.atomic import write_atomically
from simulation.errors import CacheError
from simulation.run_results import RunKey, RunResult

FORMAT = "cotune-run-result/1"
"""Changes when the same configuration shall give other results than before, or the file has other fields."""

_FIELDS = {"format", "configuration", "sha256", "result"}


def configuration_hash(configuration: Mapping[str, Any]) -> str:
    """SHA-256 of everything that results depend on, hex; the order of keys does not matter.

    Raises:
        CacheError: a value that JSON does not hold exactly.
    """
    try:
        text = _canonical([FORMAT, configuration])
    except (TypeError, ValueError) as error:
        raise CacheError(f"expected a configuration of values that JSON holds, got: {error}") from None
    return hashlib.sha256(text.encode()).hexdigest()


class ResultCache:
    """The results of one configuration.

    Args:
        folder: made when the first result is written.
        configuration: everything that results depend on: settings, data and base models by their digests.
    """

    def __init__(self, folder: Path, configuration: Mapping[str, Any]) -> None:
        self.hash = configuration_hash(configuration)
        self._folder = folder / self.hash[:16]

    def path(self, key: RunKey) -> Path:
        """Where a run's result is, or will be."""
        return self._folder / f"{key.strategy}-seed{key.seed}-{key.checkpoint}.json"

    def missing(self, keys: Iterable[RunKey]) -> list[RunKey]:
        """Those of the runs that have no result yet, in order.

        Every result that is there is read, so that a bad one is told of before anything trains.

        Raises:
            CacheError: a file cannot be used.
        """
        return [key for key in keys if self.read(key) is None]

    def read(self, key: RunKey) -> RunResult | None:
        """A run's result; None if there is none yet.

        Raises:
            CacheError: the file is torn, damaged, or of another run, configuration or format; says which.
        """
        path = self.path(key)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CacheError(f"{path}: expected a readable file: {error.strerror or error}") from None
        try:
            held = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise _unusable(path, f"a whole JSON file, got {len(content)} bytes that are not: {error}") from None
        if not isinstance(held, dict) or held.get("format") != FORMAT:
            found = held.get("format") if isinstance(held, dict) else type(held).__name__
            raise _unusable(path, f"a result of format {FORMAT!r}, got {found!r}")
        if held.keys() != _FIELDS:
            raise _unusable(path, f"fields {', '.join(sorted(_FIELDS))}, got {', '.join(sorted(held))}")
        if held["configuration"] != self.hash:
            raise _unusable(path, f"configuration {self.hash}, got {held['configuration']}")
        if held["sha256"] != hashlib.sha256(_canonical(held["result"]).encode()).hexdigest():
            raise _unusable(path, "a result with the SHA-256 that the file names, got another one")
        try:
            result = RunResult.model_validate_json(_canonical(held["result"]))
        except ValidationError as error:
            raise _unusable(path, f"a result of a run, got {error.error_count()} faults: {error.errors()[0]}") from None
        if result.key != key:
            raise _unusable(path, f"the run {key}, got {result.key}")
        return result

    def write(self, result: RunResult) -> None:
        """Keep a result, durably.

        Raises:
            OSError: the folder cannot be written.
        """
        values = result.model_dump(mode="json")
        held = {
            "format": FORMAT,
            "configuration": self.hash,
            "sha256": hashlib.sha256(_canonical(values).encode()).hexdigest(),
            "result": values,
        }
        write_atomically(self.path(result.key), _canonical(held).encode() + b"\n")


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _unusable(path: Path, expected: str) -> CacheError:
    return CacheError(f"{path}: expected {expected}; remove the file to run this again, or name another folder")
