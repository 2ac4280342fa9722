"""Real children, really killed."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from command_line import guardian
from command_line.errors import BadInput, ProcessFailed
from command_line.supervisor import ProcessSpec, RestartPolicy, Supervisor

QUICK = RestartPolicy(max_restarts=3, within_seconds=30, first_delay_seconds=0.05)
SLEEPER = "import time; time.sleep(600)"
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
)
# A child whose own child has moved to another session, as daemons do.
PARENT = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"], start_new_session=True)
time.sleep(600)
"""


def python(name: str, program: str, stop_stage: int = 0, hopeless_exit_code: int | None = None) -> ProcessSpec:
    command = [sys.executable, "-S", "-c", program]
    return ProcessSpec(name, command, stop_stage=stop_stage, hopeless_exit_code=hopeless_exit_code)


def eventually(condition: Callable[[], bool], *, seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def checked_until(supervisor: Supervisor, condition: Callable[[], bool]) -> None:
    def check() -> bool:
        supervisor.check()
        return condition()

    eventually(check)


def test_a_killed_process_comes_back_with_a_notice(tmp_path: Path) -> None:
    notices: list[str] = []
    with Supervisor(tmp_path, notify=notices.append, policy=QUICK) as supervisor:
        supervisor.start(python("agent-1", SLEEPER))
        first = supervisor.process_ids()["agent-1"]
        os.kill(first, signal.SIGKILL)
        checked_until(supervisor, lambda: supervisor.process_ids().get("agent-1", first) != first)
    assert notices[0] == "agent-1 was ended by SIGKILL; starting it again"
    assert notices[1].startswith("agent-1 is started again")


def test_a_process_that_keeps_dying_is_given_up_with_the_end_of_its_log(tmp_path: Path) -> None:
    with Supervisor(tmp_path, notify=lambda _: None, policy=QUICK) as supervisor:
        supervisor.start(python("worker", "print('no such model'); raise SystemExit(4)"))
        with pytest.raises(ProcessFailed) as caught:
            checked_until(supervisor, lambda: False)
    assert "worker ended with exit code 4, for the 4th time" in caught.value.message
    assert caught.value.message.endswith("no such model\n" * 3 + "no such model")


def test_leaving_ends_everything_even_what_ignores_sigterm_and_what_moved_away(tmp_path: Path) -> None:
    notices: list[str] = []
    with Supervisor(tmp_path, notify=notices.append, stop_seconds=0.3) as supervisor:
        supervisor.start(python("stubborn", STUBBORN))
        supervisor.start(python("parent", PARENT))
        eventually(lambda: "up" in (tmp_path / "stubborn.log").read_text())
        eventually(lambda: len(guardian.marked_processes(supervisor.mark)) == 3)
    assert guardian.marked_processes(supervisor.mark) == []
    assert any("stubborn did not end" in notice for notice in notices)


def test_later_stages_end_after_earlier_ones(tmp_path: Path) -> None:
    order = tmp_path / "order"
    program = textwrap.dedent(
        """
        import signal, sys, time
        def end(*_):
            time.sleep({delay})
            open({path!r}, "a").write("{name} ")
            sys.exit(0)
        signal.signal(signal.SIGTERM, end)
        print("up", flush=True)
        time.sleep(600)
        """
    )
    with Supervisor(tmp_path, notify=lambda _: None) as supervisor:
        for name, stage, delay in (("api", 1, 0.0), ("agent", 0, 0.3)):
            supervisor.start(python(name, program.format(delay=delay, path=str(order), name=name), stage))
        for name in ("api", "agent"):
            eventually(lambda name=name: "up" in (tmp_path / f"{name}.log").read_text())  # type: ignore[misc]
    assert order.read_text().split() == ["agent", "api"]


def test_a_second_request_to_stop_does_not_wait(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path, notify=lambda _: None, stop_seconds=60, hurry=lambda: True)
    with supervisor:
        supervisor.start(python("stubborn", STUBBORN))
        eventually(lambda: "up" in (tmp_path / "stubborn.log").read_text())
        started = time.monotonic()
    assert time.monotonic() - started < 5


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    with (
        Supervisor(tmp_path, notify=lambda _: None) as supervisor,
        pytest.raises(ProcessFailed, match="No such file"),
    ):
        supervisor.start(ProcessSpec("ghost", [str(tmp_path / "no-such-program")]))


def test_memory_and_processor_time_are_noted(tmp_path: Path) -> None:
    with Supervisor(tmp_path, notify=lambda _: None, policy=QUICK) as supervisor:
        supervisor.start(python("big", "block = bytearray(64 * 2**20)\nfor n in iter(int, 1): pass"))
        checked_until(supervisor, lambda: supervisor.peak_memory()["big"] > 60 * 2**20)
        checked_until(supervisor, lambda: supervisor.cpu_seconds()["big"] > 0.2)
        os.kill(supervisor.process_ids()["big"], signal.SIGKILL)
        checked_until(supervisor, lambda: supervisor.cpu_seconds()["big"] > 0.4)


OWNER = """
import sys, time
from pathlib import Path
from command_line.supervisor import ProcessSpec, Supervisor
with Supervisor(Path(sys.argv[1]), notify=print) as supervisor:
    supervisor.start(ProcessSpec("child", [sys.executable, "-S", "-c", sys.argv[2]]))
    print(supervisor.mark, flush=True)
    time.sleep(600)
"""


def test_kill_9_of_the_owner_leaves_no_orphan(tmp_path: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path), PARENT], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert owner.stdout is not None
    with owner:
        mark = owner.stdout.readline().strip()
        eventually(lambda: len(guardian.marked_processes(mark)) == 2)
        owner.kill()
    eventually(lambda: guardian.marked_processes(mark) == [])


def test_a_dead_guardian_is_replaced(tmp_path: Path) -> None:
    with Supervisor(tmp_path, notify=lambda _: None) as supervisor:
        first = supervisor._guardian
        assert first is not None
        first.kill()
        first.wait()
        supervisor.check()
        assert supervisor._guardian is not None
        assert supervisor._guardian.poll() is None


def test_what_cannot_start_is_not_started_again(tmp_path: Path) -> None:
    notices: list[str] = []
    program = "import sys; sys.stderr.write('before\\nworker: expected a number, got soon\\n'); sys.exit(2)"
    with Supervisor(tmp_path, notify=notices.append, policy=QUICK) as supervisor:
        supervisor.start(python("worker", program, hopeless_exit_code=2))
        with pytest.raises(BadInput) as raised:
            checked_until(supervisor, lambda: False)
    assert raised.value.message == "worker cannot start: worker: expected a number, got soon"
    assert str(tmp_path / "worker.log") in (raised.value.next_step or "")
    assert notices == []


def test_what_has_started_before_is_started_again_whatever_it_says(tmp_path: Path) -> None:
    """A database that is away for a moment must not end a cloud whose worker crashes in that moment."""
    program = (
        "import os, pathlib, sys, time; count = pathlib.Path(os.environ['COUNT'])\n"
        "number = int(count.read_text()); count.write_text(str(number + 1))\n"
        "sys.exit({0: 1, 1: 2}[number]) if number < 2 else time.sleep(600)"
    )
    (tmp_path / "count").write_text("0")
    environment = {**os.environ, "COUNT": str(tmp_path / "count")}
    with Supervisor(tmp_path, notify=lambda _: None, environment=environment, policy=QUICK) as supervisor:
        supervisor.start(python("worker", program, hopeless_exit_code=2))
        checked_until(supervisor, lambda: (tmp_path / "count").read_text() == "3")
        checked_until(supervisor, lambda: bool(supervisor.process_ids()))
