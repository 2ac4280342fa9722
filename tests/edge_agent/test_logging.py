"""What a log line may hold."""

import subprocess
import sys
from pathlib import Path

import pytest

SERVICES = Path(__file__).parents[2] / "services"
FAULT = """
import sys
from pathlib import Path
import structlog
from edge_agent.logging import configure

configure(sys.argv[1], "info", Path(sys.argv[2]))
row = "the name of " + "a patient"
try:
    len(row) // 0
except ZeroDivisionError:
    structlog.get_logger().exception("training_failed", assignment_id="asg_1")
"""


@pytest.mark.parametrize("log_format", ["console", "json"])
def test_a_fault_is_logged_with_its_place_and_without_the_rows_at_hand(tmp_path: Path, log_format: str) -> None:
    file = tmp_path / "agent.log"
    command = [sys.executable, "-c", FAULT, log_format, str(file)]
    subprocess.run(command, env={"PYTHONPATH": str(SERVICES)}, check=True, timeout=60)
    text = file.read_text()
    for shown in ("training_failed", "asg_1", "ZeroDivisionError", "line 10"):
        assert shown in text
    assert "the name of a patient" not in text
