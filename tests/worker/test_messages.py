"""Messages through the worker's stages: stored with their version, refused one by one, the same when done again."""

import threading
import time
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from assets.tensors import read_tensors
from assets.vocabulary_files import vocabulary_file
from assets.wire_files import message_file, read_message
from cotuning.examples import Example
from cotuning.strategies.interface import DeviceInputs
from cotuning.strategies.registry import steps_of
from cotuning.strategies.results import Message
from cotuning.vocabulary import Vocabulary
from persistence import jobs, rounds
from persistence.clock import utc_now
from persistence.rounds import RoundContext
from protocol.assignments import Assignment
from protocol.runs import RoundMetrics, Run
from protocol.statuses import AssignmentStatus, PartKind, RunStatus
from protocol.strategies import spec_of
from tests.tiny_models import tiny_examples, tiny_language_model
from tests.worker.cloud import LORA, Cloud
from worker.co_tuning import co_tune
from worker.leases import Lease
from worker.model_cache import ModelCache
from worker.row_files import get_rows
from worker.stage import Work

TRAINING = {"steps": 2, "batch_size": 4, "max_length": 64}
COMMON = {
    "slm_lora": LORA,
    "llm_lora": LORA,
    "training": TRAINING,
    "server": {"steps": 2, "batch_size": 4, "max_length": 64},
}
FEATURES: dict[str, Any] = {"name": "feature_based", "feature_size": 4, **COMMON}
FEDMKT: dict[str, Any] = {"name": "fedmkt", "transfer_rows": "all", "transfer_steps": 1, "top_k": 4, **COMMON}
NOTHING_ALIGNED = {"alignment": None}


def message_of(cloud: Cloud, assignment: Assignment, slm: str) -> Message:
    """What an honest device sends."""
    spec = spec_of(assignment.strategy)
    assert assignment.probe_set is not None
    received = None
    if assignment.message is not None:
        received = read_message(cloud.blobs.path(assignment.message.sha256), str(spec.received_message))
    given = DeviceInputs(
        slm=tiny_language_model(slm),
        private=tiny_examples(8, start=50, kind="sum"),
        slm_adapter=None,
        probe=get_rows(cloud.blobs, assignment.probe_set.sha256),
        message=received,
        llm_vocabulary=Vocabulary.of(tiny_language_model("llama").tokenizer),
        round_number=assignment.round_number,
        seed=assignment.seed,
        on_progress=lambda *_: None,
    )
    message = steps_of(assignment.strategy).device_step(given).message
    assert message is not None
    return message


def deliver(cloud: Cloud, device_id: str, message: Message | None = None, slm: str = "gpt2") -> None:
    assignment = cloud.take(device_id)
    spec = spec_of(assignment.strategy)
    assert spec.sent_message is not None
    sent = message or message_of(cloud, assignment, slm)
    parts = {spec.sent_message: message_file(sent, spec.sent_message)}
    if PartKind.SLM_VOCABULARY in spec.uploads:
        parts[PartKind.SLM_VOCABULARY] = vocabulary_file(tiny_language_model(slm))
    cloud.deliver(assignment, device_id, parts, metrics=NOTHING_ALIGNED)


def context(cloud: Cloud, run: Run, number: int) -> RoundContext:
    return cloud.read(rounds.get_context, cloud.round(run.run_id, number).round_id)


def refusals(cloud: Cloud, run: Run) -> dict[str, str]:
    devices = cloud.round(run.run_id).devices
    return {each.device_name: (each.reason or "").partition(":")[0] for each in devices}


def test_a_message_is_refused_by_itself_and_the_others_counted(cloud: Cloud, llm: str) -> None:
    good, *others = cloud.enrol("good", "not-finite", "of-another-size", "with-rows", "of-another-kind")
    run = cloud.create_run(llm, strategy=FEATURES, min_updates=1, grace_seconds=60)
    cloud.work()
    honest = message_of(cloud, cloud.take(good), "gpt2")
    features = honest.tensors["features"]
    wrong = [
        Message({"features": features.clone().fill_(torch.nan)}),
        Message({"features": features[:2]}),
        Message({"features": features}, rows=[Example("a", "a private row", "", "b")]),
    ]
    for device, message in zip(others, wrong, strict=False):
        deliver(cloud, device, message)
    last = cloud.take(others[3])
    parts = {PartKind.SLM_FEATURES: message_file(honest, "slm_logits")}
    cloud.deliver(last, others[3], parts, metrics=NOTHING_ALIGNED)
    deliver(cloud, good, honest)
    cloud.work()
    assert cloud.run(run.run_id).status is RunStatus.COMPLETED, cloud.run(run.run_id).status_reason
    assert refusals(cloud, run) == {
        "good": "",
        "not-finite": "non_finite_values",
        "of-another-size": "message_mismatch",
        "with-rows": "message_mismatch",
        "of-another-kind": "message_mismatch",
    }
    assert RoundMetrics.model_validate(cloud.round(run.run_id).metrics).num_updates == 1


def test_a_device_that_sends_no_message_counts_and_teaches_nothing(cloud: Cloud, llm: str) -> None:
    good, silent = cloud.enrol("good", "silent")
    run = cloud.create_run(llm, strategy=FEDMKT, min_updates=1, grace_seconds=60)
    cloud.work()
    parts = {PartKind.SLM_VOCABULARY: vocabulary_file(tiny_language_model("gpt2"))}
    cloud.deliver(cloud.take(silent), silent, parts, metrics=NOTHING_ALIGNED)
    deliver(cloud, good)
    cloud.work()
    assert cloud.run(run.run_id).status is RunStatus.COMPLETED, cloud.run(run.run_id).status_reason
    metrics = RoundMetrics.model_validate(cloud.round(run.run_id).metrics)
    assert (metrics.num_updates, list(metrics.teacher_rows["llm"])) == (2, [good])


def test_logits_of_another_tokenizer_than_the_one_that_came_are_refused(cloud: Cloud, llm: str) -> None:
    good, liar = cloud.enrol("good", "liar")
    run = cloud.create_run(llm, strategy=FEDMKT, min_updates=1, grace_seconds=60)
    cloud.work()
    deliver(cloud, liar, message_of(cloud, cloud.take(liar), "gpt2"), slm="bloom")
    deliver(cloud, good)
    cloud.work()
    assert cloud.run(run.run_id).status is RunStatus.COMPLETED, cloud.run(run.run_id).status_reason
    assert refusals(cloud, run) == {"good": "", "liar": "message_mismatch"}


def test_a_tokenizer_that_cannot_read_the_rows_costs_its_device_the_round_and_nobody_else(
    cloud: Cloud, llm: str
) -> None:
    """It is well formed and read a letter; the library raises a plain `Exception` at the first word it has not."""
    good, liar = cloud.enrol("good", "liar")
    run = cloud.create_run(llm, strategy=FEDMKT, min_updates=1, grace_seconds=60)
    cloud.work()
    assignment = cloud.take(liar)
    words = Tokenizer(WordLevel({"a": 0, "</s>": 1}, unk_token="none"))
    parts = {
        PartKind.SLM_LOGITS: message_file(message_of(cloud, assignment, "gpt2"), "slm_logits"),
        PartKind.SLM_VOCABULARY: vocabulary_file(
            Vocabulary.of(PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>"))
        ),
    }
    cloud.deliver(assignment, liar, parts, metrics=NOTHING_ALIGNED)
    deliver(cloud, good)
    cloud.work()
    assert cloud.run(run.run_id).status is RunStatus.COMPLETED, cloud.run(run.run_id).status_reason
    assert refusals(cloud, run) == {"good": "", "liar": "message_mismatch"}


def test_a_message_belongs_to_its_version_and_is_the_same_when_it_is_made_again(cloud: Cloud, llm: str) -> None:
    """Another worker that knows nothing of the first plays the same run: equal files have equal names."""
    device, *_ = cloud.enrol("only")
    found = []
    for _ in range(2):
        cloud.runner = cloud.make_runner("another")
        run = cloud.create_run(llm, strategy=FEATURES, min_updates=1, rounds=2, device_ids=[device])
        cloud.work()
        deliver(cloud, device)
        cloud.work()
        deliver(cloud, device)
        cloud.work()
        assert cloud.statuses(run.run_id, 2) == [AssignmentStatus.COUNTED]
        found.append([context(cloud, run, number).base_message_sha256 for number in (1, 2)])
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]
    message = read_message(cloud.blobs.path(found[0][1] or ""), "llm_features")
    assert message.tensors["features"].shape == (4, 4)


def test_what_the_server_keeps_grows_with_the_rounds(cloud: Cloud, llm: str) -> None:
    """Tallies of candidates: this LLM writes none, so they stay at nothing, but they are there and are read."""
    strategy = {"name": "data_based", "candidates": 2, "max_new_tokens": 2, **COMMON}
    device, *_ = cloud.enrol("only")
    run = cloud.create_run(llm, strategy=strategy, min_updates=1, rounds=2)
    cloud.work()
    assert context(cloud, run, 1).base_message_sha256 is None
    for _ in range(2):
        cloud.deliver(cloud.take(device), device, {}, metrics=NOTHING_ALIGNED)
        cloud.work()
    assert cloud.run(run.run_id).status is RunStatus.COMPLETED, cloud.run(run.run_id).status_reason
    state, _ = read_tensors(cloud.blobs.path(context(cloud, run, 2).base_server_state_sha256 or ""))
    assert state.keys() == {"offered", "kept"}


def test_a_worker_that_dies_before_it_publishes_leaves_what_the_next_one_makes_again(cloud: Cloud, llm: str) -> None:
    device, *_ = cloud.enrol("only")
    run = cloud.create_run(llm, strategy=FEATURES, min_updates=1, rounds=2)
    cloud.work()
    deliver(cloud, device)
    cloud.runner.run(cloud.sent.pop(0))
    (job_id,) = cloud.sent
    job = cloud.call(jobs.claim, job_id, "killed", 0.001, utc_now())
    assert job is not None
    with Lease(lambda: True, 60, threading.Event()) as lease:
        cache = ModelCache(cloud.settings.home, cloud.blobs)
        co_tune(Work(job, "killed", cloud.database, cloud.blobs, cache, lease))  # what it would have committed is lost
    stored = {each.sha256 for each in cloud.blobs.objects()}
    time.sleep(0.01)
    cloud.work()
    assert context(cloud, run, 1).candidate_adapter_sha256 is None
    assert context(cloud, run, 2).base_message_sha256 in stored
    assert {each.sha256 for each in cloud.blobs.objects()} == stored


@pytest.mark.parametrize("strategy", [FEATURES, FEDMKT], ids=lambda each: each["name"])
def test_a_late_message_is_for_no_later_round(cloud: Cloud, llm: str, strategy: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="`late_updates` next_round needs a strategy that averages adapters"):
        cloud.create_run(llm, strategy=strategy, late_updates="next_round")
