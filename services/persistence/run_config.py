"""A run's configuration, read once: every request of a device needs something of it, and it never changes."""

from persistence.tables import RunRow
from protocol.runs import RunCreate

MOST_RUNS = 256
"""So many configurations are remembered, some kilobytes each; then all are read again."""

_known: dict[str, RunCreate] = {}


def config_of(run: RunRow) -> RunCreate:
    """Return what the run was created with."""
    found = _known.get(run.id)
    if found is None:
        found = RunCreate.model_validate(run.config)
        if len(_known) >= MOST_RUNS:
            _known.clear()
        _known[run.id] = found
    return found
