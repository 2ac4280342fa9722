"""Which tests share a process when several run the suite (`pytest -n 2`, as `make test` does).

A file stays whole, so that what its tests share (an API, a database, a built model) is made once. A folder whose tests
share a whole cloud stays whole too. Long units come first, so that no process is left with one when the others end.
"""

from collections.abc import Sequence
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

WHOLE_FOLDERS = ("tests/end_to_end",)
"""One cloud of six processes for all their tests."""

LONG_FIRST = ("end_to_end", "worker", "edge_agent", "cloud_api", "command_line", "persistence", "benchmarks")
"""Folders below `tests` whose tests start processes or talk to a database; the others follow in their usual order."""


class WholeFiles(LoadScopeScheduling):
    """Gives whole files to processes, and whole folders where the tests of all files share something dear."""

    def __init__(self, config: pytest.Config, log: Producer | None = None) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = False  # keep the order of `long_first`; many tests are not a long time

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return next((folder for folder in WHOLE_FOLDERS if file.startswith(f"{folder}/")), file)


def long_first(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """Order tests as `LONG_FIRST` says, otherwise as they were."""
    rank = {folder: number for number, folder in enumerate(LONG_FIRST)}
    tests = Path(__file__).parent
    return sorted(items, key=lambda item: rank.get(item.path.relative_to(tests).parts[0], len(rank)))
