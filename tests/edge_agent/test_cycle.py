"""The cycle against a faulty cloud: what is sent, what becomes current, and that a kill at any point loses nothing."""

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from edge_agent import cycle, loop
from edge_agent.client import CloudClient
from edge_agent.cycle import Agent, Outcome
from edge_agent.errors import CloudUnavailable, NotAuthorised, Stopped
from edge_agent.outbox import Outbox
from protocol.assignments import AssignmentRefusal, Submission
from protocol.devices import DeviceProfile
from protocol.statuses import AssignmentStatus, PartKind
from tests.edge_agent.byte_trainer import ByteTrainer
from tests.edge_agent.conftest import make_agent, make_assignment
from tests.edge_agent.fake_cloud import FakeCloud, cut, problem

PROFILE = DeviceProfile(
    agent_version="1",
    platform="Linux",
    cpu_count=1,
    memory_bytes=1,
    model_name="m",
    model_architecture="gpt2",
    model_parameters=1,
    tokenizer_kind="BPE",
    num_examples=5,
)


def test_a_round_is_done_and_the_next_starts_from_its_state(
    agent: Agent, cloud: FakeCloud, trainer: ByteTrainer
) -> None:
    assert cycle.run_once(agent) is Outcome.IDLE
    first = make_assignment(cloud, 1)
    assert cycle.run_once(agent) is Outcome.SUBMITTED
    make_assignment(cloud, 2)
    assert cycle.run_once(agent) is Outcome.SUBMITTED
    assert trainer.calls == [("asg_1", None), ("asg_2", 1)]
    assert agent.outbox.pending() == []
    submission = Submission.model_validate_json(cloud.submissions["asg_1"])
    assert first.adapter is not None
    assert submission.base_sha256 == first.adapter.sha256
    assert {part.kind for part in submission.parts} == set(first.uploads)
    assert "download" in submission.metrics.seconds_by_stage
    statuses = [one.body for one in cloud.requests("asg_1/progress")]
    assert b"accepted" in statuses[0]
    assert b"uploading" in statuses[-1]


def test_a_file_over_the_agents_limit_is_sent_in_chunks(agent: Agent, cloud: FakeCloud) -> None:
    make_assignment(cloud)
    cloud.fail("/uploads", problem(409, "round_closed"))
    assert cycle.run_once(replace(agent, at_once_bytes=0)) is Outcome.LATE
    assert (len(cloud.requests("PUT")), len(cloud.requests("/uploads"))) == (0, 1)


FAULTY_CALLS = ["progress", "artifacts", "PUT", "submission"]


@pytest.mark.parametrize("call", FAULTY_CALLS)
def test_faults_of_every_call_are_waited_out(agent: Agent, cloud: FakeCloud, trainer: ByteTrainer, call: str) -> None:
    make_assignment(cloud)
    cloud.fail(call, cut)
    cloud.fail(call, problem(503, "unavailable"))
    assert cycle.run_once(agent) is Outcome.SUBMITTED
    assert len(trainer.calls) == 1
    assert len(cloud.parts) == 2


class Killed(BaseException):
    """Stands for the moment at which the process died."""


@pytest.mark.parametrize("call", ["PUT .*adapter_delta", "PUT .*logits", "submission"])
def test_a_kill_after_training_is_made_good_without_training_again(
    tmp_path: Path,
    agent: Agent,
    client: CloudClient,
    cloud: FakeCloud,
    stop: threading.Event,
    trainer: ByteTrainer,
    call: str,
) -> None:
    """The agent ends while it uploads; a new one with the same home folder finishes the job."""
    make_assignment(cloud)
    cloud.fail(call, lambda handler: (stop.set(), cut(handler)))  # type: ignore[func-returns-value]
    with pytest.raises(Stopped):
        cycle.run_once(agent)
    (waiting,) = Outbox(tmp_path / "outbox").pending()
    stop.clear()
    cloud.fail("submission", problem(409, "update_incomplete"))
    again = make_agent(tmp_path, client, stop, trainer)
    assert cycle.run_once(again) is Outcome.SUBMITTED
    assert len(trainer.calls) == 1
    assert Submission.model_validate_json(cloud.submissions["asg_1"]) == waiting.submission
    assert len(cloud.parts) == 2
    state = again.states.before("run_1", 2)
    assert state is not None
    assert state.record.assignment_id == "asg_1"


def test_an_update_that_had_arrived_whole_is_only_submitted_again(
    tmp_path: Path, agent: Agent, client: CloudClient, cloud: FakeCloud, stop: threading.Event, trainer: ByteTrainer
) -> None:
    """The answer to the submission was lost: the server may even have closed the round and counted it since."""
    make_assignment(cloud)
    cloud.fail("submission", lambda handler: (stop.set(), cut(handler)))  # type: ignore[func-returns-value]
    with pytest.raises(Stopped):
        cycle.run_once(agent)
    stop.clear()
    uploads = len(cloud.requests("PUT"))
    cloud.fail("progress", problem(409, "illegal_transition"))
    assert cycle.run_once(make_agent(tmp_path, client, stop, trainer)) is Outcome.SUBMITTED
    assert len(cloud.requests("PUT")) == uploads


@pytest.mark.parametrize("moment", ["keep_receipt", "adopt", "drop"])
def test_a_kill_after_the_receipt_is_made_good(
    tmp_path: Path,
    agent: Agent,
    client: CloudClient,
    cloud: FakeCloud,
    stop: threading.Event,
    trainer: ByteTrainer,
    moment: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    owner = {"keep_receipt": cycle.OutboxEntry, "adopt": cycle.LocalStates, "drop": Outbox}[moment]
    original = getattr(owner, moment)

    def die_afterwards(*args: object) -> None:
        original(*args)
        raise Killed

    make_assignment(cloud)
    with monkeypatch.context() as patch:
        patch.setattr(owner, moment, die_afterwards)
        with pytest.raises(Killed):
            cycle.run_once(agent)
    submissions = len(cloud.requests("submission"))
    again = make_agent(tmp_path, client, stop, trainer)
    outcome = cycle.run_once(again)
    assert outcome is (Outcome.IDLE if moment == "drop" else Outcome.SUBMITTED)
    assert len(cloud.requests("submission")) == submissions
    assert len(trainer.calls) == 1
    assert again.outbox.pending() == []
    state = again.states.before("run_1", 2)
    assert state is not None
    assert state.record.round_number == 1


def test_training_that_was_cut_is_repeated_with_the_same_bytes(
    tmp_path: Path, agent: Agent, client: CloudClient, cloud: FakeCloud, stop: threading.Event
) -> None:
    make_assignment(cloud, 1)
    cycle.run_once(agent)
    make_assignment(cloud, 2)

    def die(on_progress: object) -> None:
        raise Killed

    with pytest.raises(Killed):
        cycle.run_once(replace(agent, trainer=lambda: ByteTrainer(during=die)))
    trainer = ByteTrainer()
    assert cycle.run_once(make_agent(tmp_path, client, stop, trainer)) is Outcome.SUBMITTED
    assert trainer.calls == [("asg_2", 1)]
    first_try = dict(cloud.parts)
    del cloud.submissions["asg_2"]
    # The server forgot the submission (a restored backup): the same assignment once more, from the same state.
    assert cycle.run_once(agent) is Outcome.SUBMITTED
    assert cloud.parts == first_try


@pytest.mark.parametrize("call", ["PUT", "submission"])
def test_a_late_update_is_dropped_and_does_not_become_current(agent: Agent, cloud: FakeCloud, call: str) -> None:
    make_assignment(cloud)
    cloud.fail(call, problem(409, "round_closed"))
    assert cycle.run_once(agent) is Outcome.LATE
    assert agent.outbox.pending() == []
    assert agent.states.before("run_1", 2) is None
    assert not cloud.requests("refusal")


@pytest.mark.parametrize(
    ("call", "status", "code"),
    [
        ("PUT", 409, "update_conflict"),
        ("PUT", 422, "wrong_tensor_names"),
        ("submission", 422, "non_finite_values"),
        ("artifacts", 422, "invalid_field"),
    ],
)
def test_what_the_server_will_not_have_is_answered_with_a_refusal(
    agent: Agent, cloud: FakeCloud, call: str, status: int, code: str
) -> None:
    make_assignment(cloud)
    cloud.fail(call, problem(status, code, "because"))
    assert cycle.run_once(agent) is Outcome.REFUSED
    assert agent.outbox.pending() == []
    (refusal,) = cloud.requests("refusal")
    assert AssignmentRefusal.model_validate_json(refusal.body) == AssignmentRefusal(code=code, reason="because")


class SecretError(Exception):
    """A library's error that quotes a row."""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SecretError("could not encode 'my private diary'"), "training_failed"),
        (MemoryError("my private diary"), "out_of_memory"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried 1 byte"), "out_of_memory"),
    ],
)
def test_a_failing_training_is_refused_with_a_reason_that_quotes_nothing(
    agent: Agent, cloud: FakeCloud, error: Exception, code: str, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(on_progress: object) -> None:
        raise error

    make_assignment(cloud)
    assert cycle.run_once(replace(agent, trainer=lambda: ByteTrainer(during=fail))) is Outcome.REFUSED
    (refusal,) = cloud.requests("refusal")
    assert AssignmentRefusal.model_validate_json(refusal.body).code == code
    assert type(error).__name__.encode() in refusal.body
    assert all(b"diary" not in one.body for one in cloud.received)


def test_an_assignment_that_asks_for_what_its_strategy_must_not_send_is_refused(
    agent: Agent, cloud: FakeCloud, trainer: ByteTrainer
) -> None:
    make_assignment(cloud, strategy={"name": "standalone"}, uploads=[PartKind.LOGITS])
    assert cycle.run_once(agent) is Outcome.REFUSED
    assert trainer.calls == []
    assert b"undeclared_upload" in cloud.requests("refusal")[0].body


def test_an_update_over_the_limit_is_not_sent(agent: Agent, cloud: FakeCloud) -> None:
    make_assignment(cloud, upload_limits={PartKind.LOGITS: 10})
    assert cycle.run_once(agent) is Outcome.REFUSED
    assert not cloud.requests("PUT")
    assert b"expected at most 10 bytes, got 32000" in cloud.requests("refusal")[0].body


def test_a_round_that_closes_during_training_cancels_it(agent: Agent, cloud: FakeCloud) -> None:
    def train(on_progress: object) -> None:
        cloud.fail("progress", problem(409, "round_closed"))
        for step in range(5000):
            on_progress("mutual_learning", step, 5000, {})  # type: ignore[operator]
            time.sleep(0.001)

    make_assignment(cloud)
    assert cycle.run_once(replace(agent, trainer=lambda: ByteTrainer(during=train))) is Outcome.LATE
    assert agent.outbox.pending() == []


def test_an_assignment_known_as_training_is_not_accepted_again(agent: Agent, cloud: FakeCloud) -> None:
    make_assignment(cloud, status=AssignmentStatus.TRAINING)
    assert cycle.run_once(agent) is Outcome.SUBMITTED
    assert all(b"accepted" not in one.body for one in cloud.requests("progress"))


def test_a_revoked_device_ends_the_loop_and_keeps_its_update(agent: Agent, cloud: FakeCloud) -> None:
    make_assignment(cloud)
    cloud.fail("submission", problem(403, "device_revoked"))
    with pytest.raises(NotAuthorised):
        loop.run(agent, PROFILE)
    assert len(agent.outbox.pending()) == 1


def test_the_loop_outlives_a_server_that_is_down_at_any_time(
    agent: Agent, cloud: FakeCloud, stop: threading.Event
) -> None:
    """Down at the start, down at a poll: the loop goes on, and sends its profile once."""
    cloud.fail("heartbeat", cut, times=2)
    cloud.fail("assignment", problem(502, "unavailable"), times=2)
    make_assignment(cloud)
    ended = []

    def run() -> None:
        with pytest.raises(Stopped):
            loop.run(agent, PROFILE)
        ended.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    deadline = time.monotonic() + 10
    while "asg_1" not in cloud.submissions and time.monotonic() < deadline:
        time.sleep(0.02)
    stop.set()
    thread.join(timeout=3)
    assert ended
    assert "asg_1" in cloud.submissions
    assert b'"num_examples":5' in cloud.requests("heartbeat")[-1].body


def test_an_idle_loop_does_not_hammer_a_server_that_answers_at_once(
    agent: Agent, cloud: FakeCloud, stop: threading.Event
) -> None:
    threading.Timer(1.5, stop.set).start()
    with pytest.raises(Stopped):
        loop.run(agent, PROFILE)
    assert len(cloud.requests("assignment")) <= 3


def test_run_once_says_whether_the_cloud_was_there_at_all(agent: Agent, cloud: FakeCloud) -> None:
    assert loop.run_until_work(agent, 0) is Outcome.IDLE
    cloud.fail("assignment", cut, times=1000)
    with pytest.raises(CloudUnavailable):
        loop.run_until_work(agent, 0.3)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"strategy": {"name": "of_another_release"}}, "strategy: Input tag 'of_another_release'"),
        (
            {"strategy": {"name": "standalone", "of_another_release": 1}},
            "strategy.standalone.of_another_release: Extra inputs",
        ),
        ({"uploads": ["of_another_release"]}, "uploads.0: Input should be"),
    ],
)
def test_an_assignment_of_an_unknown_strategy_is_refused_and_not_asked_for_again(
    agent: Agent, cloud: FakeCloud, changed: dict[str, object], expected: str
) -> None:
    message = make_assignment(cloud).model_dump(mode="json") | changed
    cloud.fail("GET /v1/devices/me/assignment", lambda handler: handler.send_json(200, message))
    assert cycle.run_once(agent) is Outcome.REFUSED
    refusal = AssignmentRefusal.model_validate_json(cloud.requests("asg_1/refusal")[0].body)
    assert refusal.code == "unknown_strategy"
    assert refusal.reason.startswith("this device's Cotune does not know it, or has not got it installed: ")
    assert expected in refusal.reason


def test_an_answer_that_is_no_assignment_at_all_is_asked_for_again(agent: Agent, cloud: FakeCloud) -> None:
    cloud.fail("GET /v1/devices/me/assignment", lambda handler: handler.send_json(200, {"strategy": {"name": "no"}}))
    with pytest.raises(CloudUnavailable, match="expected a Assignment, got another body: assignment_id"):
        cycle.run_once(agent)
    assert cloud.requests("refusal") == []
