"""docs/rounds.md says which moves there are; it must say what the code allows."""

import re
from pathlib import Path
from typing import Any

import pytest

from persistence.tables import AssignmentRow, JobRow, RoundRow, RunRow
from persistence.transitions import MOVES
from protocol.statuses import WaitingFor

PAGE = (Path(__file__).parents[2] / "docs" / "rounds.md").read_text(encoding="utf-8")


def told(heading: str) -> dict[str, set[str]]:
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    table = section.partition("| can become |")[2].partition("\n\n")[0]
    rows = [line.strip("| ").split("|") for line in table.splitlines() if line.startswith("| `")]
    names = [[re.findall(r"`(\w+)`", cell) for cell in (row[0], row[2] if len(row) > 2 else "")] for row in rows]
    return {status[0]: set(moves) for status, moves in names}


@pytest.mark.parametrize(
    ("heading", "row"),
    [("A run", RunRow), ("A round", RoundRow), ("A device's share", AssignmentRow), ("Jobs", JobRow)],
)
def test_the_page_has_the_moves_of_the_code(heading: str, row: Any) -> None:
    assert told(heading) == {status.value: {to.value for to in moves} for status, moves in MOVES[row].items()}


def test_the_page_has_every_word_that_a_waiting_run_uses() -> None:
    table = PAGE.partition("| `for` |")[2].partition("\n\n")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert {word for cell in cells for word in re.findall(r"`(\w+)`", cell)} == {each.value for each in WaitingFor}
