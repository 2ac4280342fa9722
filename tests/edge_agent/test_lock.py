"""One agent a home folder, across processes and kills."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edge_agent import lock
from edge_agent.errors import AlreadyRunning

HOLDER = """
import sys, time
from pathlib import Path
from edge_agent import lock
with lock.hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_told_who_holds_it_until_the_holder_dies(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        assert lock.holder(tmp_path) == process.pid
        with pytest.raises(AlreadyRunning, match=str(process.pid)), lock.hold(tmp_path):
            pass
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert lock.holder(tmp_path) is None
    with lock.hold(tmp_path):
        assert lock.holder(tmp_path) == os.getpid()
    assert lock.holder(tmp_path) is None


def test_a_folder_that_never_ran_has_no_holder(tmp_path: Path) -> None:
    assert lock.holder(tmp_path) is None
