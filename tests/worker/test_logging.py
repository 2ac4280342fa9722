"""What the worker's logs hold, and what they never do."""

import json
import subprocess
import sys

import pytest

PROGRAM = """
import logging as standard, structlog
from worker import logging
logging.configure({format!r})
def fail(row):
    raise ValueError("broken")
try:
    fail("private text")
except ValueError:
    structlog.get_logger("worker").exception("job_crashed", job_id="job_1")
standard.getLogger("celery").warning("from a library")
"""


@pytest.mark.parametrize("log_format", ["console", "json"])
def test_a_traceback_is_logged_without_local_variables(log_format: str) -> None:
    program = PROGRAM.format(format=log_format)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "job_crashed" in done.stderr
    assert "ValueError: broken" in done.stderr
    assert "from a library" in done.stderr
    assert "private text" not in done.stderr
    if log_format == "json":
        crash, warning = map(json.loads, done.stderr.splitlines())
        assert (crash["job_id"], crash["level"], warning["level"]) == ("job_1", "error", "warning")
