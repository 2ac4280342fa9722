"""What is shown while a run goes on."""

import io

from rich.console import Console

from command_line.live_view import LiveView, PlainView, run_panel, view
from command_line.watching import Look, changes
from protocol.statuses import AssignmentStatus, RoundStatus, RunStatus
from tests.command_line.sample_results import a_round, a_run, round_device, traffic


def look(round_status: RoundStatus, *devices: AssignmentStatus, run_status: RunStatus = RunStatus.RUNNING) -> Look:
    members = [round_device(name, status) for name, status in zip(("phone", "tablet"), devices, strict=False)]
    return Look(a_run(run_status), a_round(1, members, round_status), traffic())


def terminal(*, is_terminal: bool) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, force_terminal=is_terminal, width=100, highlight=False, _environ={}), stream


def test_changes_tell_statuses_and_not_steps() -> None:
    training = look(RoundStatus.COLLECTING, AssignmentStatus.TRAINING, AssignmentStatus.ACCEPTED)
    assert changes(None, training) == ["co-tuning: running", "co-tuning: round 1 of 3: devices train"]
    assert changes(training, training) == []
    submitted = look(RoundStatus.COLLECTING, AssignmentStatus.SUBMITTED, AssignmentStatus.TRAINING)
    assert changes(training, submitted) == ["co-tuning: round 1 of 3: phone submitted, slm 1.250"]
    counted = look(RoundStatus.CO_TUNING, AssignmentStatus.COUNTED, AssignmentStatus.COUNTED)
    assert changes(submitted, counted) == ["co-tuning: round 1 of 3: the LLM and the small model teach each other"]


def test_changes_tell_why_a_run_failed() -> None:
    failed = Look(a_run(RunStatus.FAILED, reason="no update came"), None, traffic())
    assert changes(None, failed) == ["co-tuning: failed (no update came)"]


def test_a_pipe_gets_short_plain_lines() -> None:
    console, stream = terminal(is_terminal=False)
    with view(console) as plain:
        assert isinstance(plain, PlainView)
        plain.step("Starting the cloud")
        plain.facts({"API": "http://127.0.0.1:1"})
        for done in range(101):
            plain.progress("LLM", done, 100)
        plain.say("phone was ended by SIGKILL; starting it again")
        for _ in range(3):
            plain.show([look(RoundStatus.COLLECTING, AssignmentStatus.TRAINING)])
    lines = stream.getvalue().splitlines()
    assert [line.partition("] ")[2] for line in lines] == [
        "Starting the cloud",
        "  API: http://127.0.0.1:1",
        "  LLM: done",
        "  phone was ended by SIGKILL; starting it again",
        "  co-tuning: running",
        "  co-tuning: round 1 of 3: devices train",
    ]


def test_a_terminal_gets_one_picture() -> None:
    console, _ = terminal(is_terminal=True)
    shown = view(console)
    assert isinstance(shown, LiveView)
    with shown:
        shown.step("Co-tuning")
        shown.facts({"API": "http://127.0.0.1:1/docs", "Logs": "/tmp/logs"})
        shown.say("tablet is started again")
        shown.progress("LLM", 3, 10)
        shown.show([look(RoundStatus.COLLECTING, AssignmentStatus.TRAINING, AssignmentStatus.SUBMITTED)])
        with console.capture() as captured:
            console.print(shown._render())
    text = captured.get()
    for word in (
        "Co-tuning", "http://127.0.0.1:1/docs", "/tmp/logs", "tablet is started again", "LLM", "3/10",
        "round 1 of 3", "devices train", "phone", "training", "submitted", "mutual_learning", "slm 1.250",
        "devices sent 3.0 MB, received 5.0 MB",
    ):  # fmt: skip
        assert word in text, word


def test_a_run_without_a_round_says_what_it_waits_for() -> None:
    console, stream = terminal(is_terminal=False)
    console.print(run_panel(Look(a_run(RunStatus.PREPARING, 0, "distilling the proxy"), None, traffic())))
    assert "distilling the proxy" in stream.getvalue()
