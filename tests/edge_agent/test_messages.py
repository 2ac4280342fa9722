"""Messages and tokenizers on a device: what is fetched, what is read, what leaves, and what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from assets.tensors import read_tensors
from assets.vocabulary_files import read_vocabulary, vocabulary_file
from assets.wire_files import message_file, read_message
from cotuning.strategies.results import Message
from edge_agent import cycle, loop
from edge_agent.cycle import Agent, Outcome, RoundFiles, TrainedUpdate, check_assignment, check_sizes
from edge_agent.errors import CannotTrain
from edge_agent.run_endings import end_runs
from edge_agent.training import LocalTrainer
from protocol.assignments import ArtifactRef, Assignment
from protocol.runs import DeviceMetrics
from protocol.statuses import PartKind
from protocol.strategies import (
    DataBasedSettings,
    FeatureBasedSettings,
    FedMktSettings,
    LocalTraining,
    StandaloneSettings,
)
from tests.edge_agent.byte_trainer import ByteTrainer
from tests.edge_agent.fake_cloud import FakeCloud, Fault, Handler
from tests.edge_agent.tiny_world import LORA, SECRETS, TinyWorld, build_world
from tests.tiny_models import tiny_language_model

TRAINING: dict[str, Any] = {"slm_lora": LORA, "training": LocalTraining(steps=2, batch_size=4, max_length=96)}
FEATURES = FeatureBasedSettings(feature_size=4, **TRAINING)
FEDMKT = FedMktSettings(top_k=4, transfer_steps=1, **TRAINING)
SOMEWHERE = ArtifactRef(sha256="0" * 64, size_bytes=1)
NOTHING: dict[str, Any] = {"proxy_manifest": None, "adapter": None, "upload_limits": {}}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return build_world(tmp_path_factory.mktemp("world"))


def features_file(folder: Path, kind: str = "llm_features", num_rows: int = 6) -> Path:
    path = folder / "message"
    generator = torch.Generator().manual_seed(0)
    path.write_bytes(message_file(Message({"features": torch.randn(num_rows, 4, generator=generator).half()}), kind))
    return path


def trained(world: TinyWorld, assignment: Assignment, **files: Path) -> TrainedUpdate:
    given = RoundFiles(None, None, world.probe_set, **files)
    return LocalTrainer(world.config).train(assignment, given, None, lambda *_: None)


def num_probe_rows(world: TinyWorld) -> int:
    return len(world.probe_set.read_bytes().splitlines())


def test_a_message_leaves_as_the_only_part_and_holds_no_private_text(
    world: TinyWorld, cloud: FakeCloud, tmp_path: Path
) -> None:
    kinds = [PartKind.SLM_FEATURES]
    assignment = world.assignment(cloud, strategy=FEATURES, uploads=kinds, optional_uploads=kinds, **NOTHING)
    update = trained(world, assignment, message=features_file(tmp_path, num_rows=num_probe_rows(world)))
    check_sizes(assignment, update)
    assert list(update.parts) == kinds
    (tmp_path / "sent").write_bytes(update.parts[PartKind.SLM_FEATURES])
    sent = read_message(tmp_path / "sent", "slm_features")
    assert sent.tensors["features"].shape == (num_probe_rows(world), 4)
    assert sent.rows == []


def test_a_tokenizer_leaves_where_it_is_declared(world: TinyWorld, cloud: FakeCloud, tmp_path: Path) -> None:
    llm = tmp_path / "llm"
    llm.write_bytes(vocabulary_file(tiny_language_model("llama")))
    uploads = [PartKind.SLM_LOGITS, PartKind.SLM_VOCABULARY]
    assignment = world.assignment(
        cloud, strategy=FEDMKT, uploads=uploads, optional_uploads=uploads[:1], llm_vocabulary=SOMEWHERE, **NOTHING
    )
    check_assignment(assignment)
    update = trained(world, assignment, llm_vocabulary=llm)
    check_sizes(assignment, update)
    (tmp_path / "sent").write_bytes(update.parts[PartKind.SLM_VOCABULARY])
    (tmp_path / "logits").write_bytes(update.parts[PartKind.SLM_LOGITS])
    assert read_vocabulary(tmp_path / "sent").table.fingerprint in str(read_tensors(tmp_path / "logits")[1])
    for secret in SECRETS:
        assert all(secret.encode() not in content for content in update.parts.values())


def test_a_message_of_another_kind_is_not_read(world: TinyWorld, cloud: FakeCloud, tmp_path: Path) -> None:
    assignment = world.assignment(cloud, strategy=FEATURES, uploads=[PartKind.SLM_FEATURES], **NOTHING)
    with pytest.raises(CannotTrain, match="expected llm_features, got candidates") as caught:
        trained(world, assignment, message=features_file(tmp_path, "candidates"))
    assert caught.value.code == "message_mismatch"
    assert str(tmp_path) not in caught.value.reason


def test_what_the_strategy_does_not_declare_is_refused(world: TinyWorld, cloud: FakeCloud) -> None:
    alone = StandaloneSettings(slm_lora=LORA)
    wrong = {
        "undeclared_message": {"strategy": alone, "uploads": [], "message": SOMEWHERE},
        "undeclared_upload": {"strategy": FEATURES, "uploads": [PartKind.SLM_VOCABULARY]},
        "incomplete_assignment": {"strategy": FEDMKT, "uploads": [PartKind.SLM_LOGITS]},
    }
    for code, changes in wrong.items():
        with pytest.raises(CannotTrain) as caught:
            check_assignment(world.assignment(cloud, **NOTHING | changes))
        assert caught.value.code == code


def test_only_what_is_optional_may_be_missing(world: TinyWorld, cloud: FakeCloud) -> None:
    counts = [PartKind.COUNTS]
    some = DataBasedSettings(**TRAINING)
    assignment = world.assignment(cloud, strategy=some, uploads=counts, optional_uploads=counts, **NOTHING)
    nothing = TrainedUpdate({}, 1, DeviceMetrics(), lambda folder: None)
    check_sizes(assignment, nothing)
    for strict, update in (
        (assignment.model_copy(update={"optional_uploads": []}), nothing),
        (assignment, replace(nothing, parts={PartKind.LOGITS: b"x"})),
    ):
        with pytest.raises(CannotTrain, match="training gave"):
            check_sizes(strict, update)


def test_a_message_is_fetched_by_its_hash_and_dropped_when_no_round_needs_it(
    world: TinyWorld, cloud: FakeCloud, agent: Agent, tmp_path: Path
) -> None:
    kinds, fetched = [PartKind.SLM_FEATURES], []
    for number in (1, 2, 3, 4):
        content = b"message of round %d" % max(number, 2)  # one that was not promoted: the next round has the same
        message = cloud.add_artifact(content)
        world.assignment(
            cloud, number, strategy=FEATURES, uploads=kinds, optional_uploads=kinds, message=message, **NOTHING
        )
        assert cycle.run_once(agent) is Outcome.SUBMITTED
        fetched.append(message.sha256)
    kept = {path.name for path in tmp_path.rglob("cache/files/*")}
    assert fetched[0] == fetched[1]
    assert [sha256 in kept for sha256 in fetched] == [False, False, True, True]
    assert len(cloud.requests(f"GET /v1/artifacts/{fetched[0]}")) == 1


@pytest.fixture
def at_the_end(agent: Agent, world: TinyWorld, cloud: FakeCloud, trainer: ByteTrainer) -> Assignment:
    """A device that has delivered the last round of a run whose last message is to be learnt from."""
    kinds = [PartKind.SLM_LOGITS]
    vocabulary = cloud.add_artifact(b"a tokenizer")
    last = world.assignment(
        cloud, 3, strategy=FEDMKT, uploads=kinds, optional_uploads=kinds, llm_vocabulary=vocabulary, **NOTHING
    )
    assert cycle.run_once(agent) is Outcome.SUBMITTED
    trainer.calls.clear()
    return last


def test_the_step_after_the_last_round_is_taken_once_the_run_is_completed(
    agent: Agent, cloud: FakeCloud, trainer: ByteTrainer, at_the_end: Assignment
) -> None:
    for answer in (answered(204), answered(503)):  # it goes on; the cloud is away
        cloud.fail("last-step", answer)
        end_runs(agent)
        assert trainer.calls == []
    message = cloud.add_artifact(b"the last message")
    given = at_the_end.model_copy(
        update={"round_number": 4, "message": message, "uploads": [], "optional_uploads": [], "upload_limits": {}}
    )
    cloud.fail("last-step", lambda handler: handler.send_json(200, given.model_dump(mode="json")))
    sent = agent.client._ledger.totals()
    for _ in range(2):
        end_runs(agent)
    assert trainer.calls == [("last step", 3)]
    assert agent.client._ledger.totals() == sent  # nothing leaves
    (state,) = agent.states.newest()
    assert (state.record.round_number, state.record.last_step_due) == (4, False)
    assert (state.slm_adapter / "psi").read_bytes().endswith(b"the last message")


def test_a_run_that_ended_otherwise_is_not_asked_about_again(
    agent: Agent, cloud: FakeCloud, trainer: ByteTrainer, at_the_end: Assignment
) -> None:
    problem = {"code": "illegal_transition", "detail": "no", "status": 409, "title": "no", "type": "x"}
    cloud.fail("last-step", lambda handler: handler.send_json(409, problem))
    for _ in range(2):
        end_runs(agent)
    assert len(cloud.requests("last-step")) == 1
    assert trainer.calls == []
    (state,) = agent.states.newest()
    assert (state.record.round_number, state.record.last_step_due) == (at_the_end.round_number, False)


@pytest.mark.parametrize("changed", [{"run_id": "run-other"}, {"round_number": 3}, {"strategy": {"name": "newer"}}])
def test_what_is_no_last_step_of_this_run_ends_the_asking_and_not_the_agent(
    changed: dict[str, Any], agent: Agent, cloud: FakeCloud, trainer: ByteTrainer, at_the_end: Assignment
) -> None:
    given = at_the_end.model_dump(mode="json") | {"round_number": 4} | changed
    cloud.fail("last-step", lambda handler: handler.send_json(200, given))
    for _ in range(2):
        end_runs(agent)
    assert len(cloud.requests("last-step")) == 1
    assert trainer.calls == []
    (state,) = agent.states.newest()
    assert (state.record.round_number, state.record.last_step_due) == (3, False)


def test_who_does_one_assignment_at_a_time_takes_the_last_step_too(
    agent: Agent, cloud: FakeCloud, trainer: ByteTrainer, at_the_end: Assignment
) -> None:
    given = at_the_end.model_copy(update={"round_number": 4, "message": cloud.add_artifact(b"the last message")})
    cloud.fail("last-step", lambda handler: handler.send_json(200, given.model_dump(mode="json")))
    left = agent.states.begin_training(at_the_end.run_id, at_the_end.assignment_id)
    left.mkdir(parents=True)
    assert loop.run_until_work(agent, 0) is Outcome.IDLE
    assert trainer.calls == [("last step", 3)]
    assert not left.exists()


def test_a_panic_of_a_library_does_not_end_the_agent() -> None:
    class PanicException(BaseException):
        """As a library in Rust raises it."""

    def train() -> None:
        raise PanicException("a private row")

    with pytest.raises(CannotTrain, match=r"training_failed: PanicException at test_messages\.py") as refusal:
        cycle.told(train)
    assert "private" not in str(refusal.value)


def answered(status: int) -> Fault:
    def answer(handler: Handler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer
