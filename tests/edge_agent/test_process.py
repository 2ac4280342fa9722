"""The real process: killed, stopped, revoked, started twice; and what it sends, byte by byte."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest

from assets.tensors import read_tensors
from edge_agent import cycle, lock
from edge_agent.cycle import Agent, Outcome
from edge_agent.exit_codes import ExitCode
from edge_agent.ledger import Ledger
from edge_agent.local_state import LocalStates
from edge_agent.training import LocalTrainer
from protocol.strategies import CoPlmsSettings
from tests.edge_agent.fake_cloud import FakeCloud, cut, problem, running_cloud
from tests.edge_agent.test_ledger import now
from tests.edge_agent.tiny_world import CO_PLMS, SECRETS, TinyWorld, build_world

STEPS_OF_A_LONG_ROUND = 2000


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return build_world(tmp_path_factory.mktemp("world"), slm="bloom")


def steps(number: int) -> CoPlmsSettings:
    return CO_PLMS.model_copy(update={"training": CO_PLMS.training.model_copy(update={"steps": number})})


@contextmanager
def agent_process(home: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "edge_agent", *(arguments or ("start",)), "--home", str(home)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "COTUNE_LOG_FORMAT": "json", "COTUNE_LOG_LEVEL": "debug"}
    with (
        open(home / "agent.log", "ab") as log,
        subprocess.Popen(command, stderr=log, stdout=log, env=environment) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


def wait_for(done: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


def training(cloud: FakeCloud) -> bool:
    return any(b"mutual_learning" in one.body for one in cloud.requests("progress"))


def kept_state(home: Path) -> dict[str, bytes]:
    state = LocalStates(home / "runs").newest()[0]
    assert state.record.round_number == 2
    return {path.name: path.read_bytes() for path in state.folder.rglob("*.safetensors")}


def test_a_kill_in_training_changes_no_byte_of_what_is_sent_and_kept(
    world: TinyWorld, agent: Agent, cloud: FakeCloud, tmp_path: Path
) -> None:
    """Two rounds, the first with a kill -9 in the middle, against two rounds of an agent in this process."""
    undisturbed = replace(agent, trainer=partial(LocalTrainer, world.config))
    for number in (1, 2):
        world.assignment(cloud, number, strategy=steps(4))
        assert cycle.run_once(undisturbed) is Outcome.SUBMITTED

    with running_cloud() as second_cloud:
        home = world.home(second_cloud.url)
        world.assignment(second_cloud, 1, strategy=steps(STEPS_OF_A_LONG_ROUND))
        with agent_process(home) as process:
            wait_for(lambda: training(second_cloud))
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        assert not second_cloud.parts
        second_cloud.assignments.clear()
        world.assignment(second_cloud, 1, strategy=steps(4))
        with agent_process(home) as process:
            wait_for(lambda: "asg_1" in second_cloud.submissions)
            world.assignment(second_cloud, 2, strategy=steps(4))
            wait_for(lambda: "asg_2" in second_cloud.submissions and not list((home / "outbox").iterdir()))
            assert lock.holder(home) == process.pid
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=10) == ExitCode.OK
    assert second_cloud.parts == cloud.parts
    assert len(cloud.parts) == 4
    assert kept_state(home) == kept_state(tmp_path)


def test_nothing_private_is_sent_or_logged_and_the_ledger_lists_everything(world: TinyWorld) -> None:
    with running_cloud() as cloud:
        home = world.home(cloud.url)
        world.assignment(cloud, 1, strategy=steps(4))
        cloud.fail("PUT .*logits", cut)
        with agent_process(home, "run-once") as process:
            assert process.wait(timeout=120) == ExitCode.OK
    state = LocalStates(home / "runs").newest()[0]
    assert state.domain_adapter is not None
    forbidden = [text.encode() for text in SECRETS] + [b"dev_1.secret"]
    for path in (state.slm_adapter / "adapter_model.safetensors", state.domain_adapter):
        tensors = read_tensors(path)[0]
        forbidden += [row.numpy().tobytes() for tensor in tensors.values() for row in tensor if row.any()]
    assert len(forbidden) > 50
    said = [one.body for one in cloud.received] + [(home / "agent.log").read_bytes()]
    assert all(secret not in body for body in said for secret in forbidden)
    # The parts themselves are there, so the search did look at real uploads.
    assert sum(len(one.body) for one in cloud.requests("PUT")) > 1000
    entries = list(Ledger(home / "ledger.jsonl", now).entries())
    sent = [one for one in cloud.received if one.body]
    assert sorted(entry.size_bytes for entry in entries) == sorted(len(one.body) for one in sent)
    kinds = {entry.kind: entry.run_id for entry in entries}
    assert kinds.pop("heartbeat", None) is None
    assert kinds == dict.fromkeys(("progress", "adapter_delta", "logits", "submission"), "run_1")


def test_sigterm_ends_training_and_a_hanging_poll_in_time_and_leaves_no_orphan(world: TinyWorld) -> None:
    with running_cloud() as cloud:
        home = world.home(cloud.url)
        for stage in ("poll", "training"):
            if stage == "poll":
                cloud.fail("assignment", lambda handler: time.sleep(15))
            else:
                world.assignment(cloud, 1, strategy=steps(STEPS_OF_A_LONG_ROUND))
            with agent_process(home) as process:
                if stage == "poll":
                    wait_for(lambda: bool(cloud.requests("assignment")))
                else:
                    wait_for(lambda: training(cloud))
                children = psutil.Process(process.pid).children(recursive=True)
                process.send_signal(signal.SIGTERM)
                assert process.wait(timeout=10) == ExitCode.OK
                assert not any(child.is_running() for child in children)
        assert lock.holder(home) is None


def test_a_second_agent_a_revoked_one_and_one_without_a_cloud(world: TinyWorld) -> None:
    with running_cloud() as cloud:
        home = world.home(cloud.url)
        with agent_process(home) as first:
            wait_for(lambda: bool(cloud.requests("assignment")))
            with agent_process(home) as second:
                assert second.wait(timeout=60) == ExitCode.ALREADY_RUNNING
            cloud.fail("assignment", problem(403, "device_revoked", "revoked by an operator"))
            assert first.wait(timeout=60) == ExitCode.CONNECTION_OR_AUTHORISATION
        with agent_process(home, "run-once", "--timeout", "0.2") as process:
            assert process.wait(timeout=60) == ExitCode.TIMED_OUT
    with agent_process(home, "run-once", "--timeout", "0.2") as process:
        assert process.wait(timeout=60) == ExitCode.CONNECTION_OR_AUTHORISATION
    log = (home / "agent.log").read_text()
    assert f"process {first.pid}" in log
    assert "does not accept this device: revoked by an operator" in log
