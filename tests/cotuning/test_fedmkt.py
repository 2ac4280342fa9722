import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from cotuning.adapters import AdapterState, activate, adapted, adapter_state, lora_config
from cotuning.encoded_rows import EncodedRows
from cotuning.examples import Example
from cotuning.language_model import LanguageModel
from cotuning.payload import PayloadError
from cotuning.probe_logits import probe_payload, row_losses
from cotuning.received_logits import Received
from cotuning.seeding import derive_seed, isolated_generators
from cotuning.shared_rows import CoverageTooLow
from cotuning.strategies import fedmkt
from cotuning.strategies.fedmkt import FedMkt
from cotuning.strategies.interface import DeviceMessage
from cotuning.strategies.results import DeviceResult, Message, ServerResult
from cotuning.training import draw_batches, row_sizes
from cotuning.tuning import tune_adapter
from cotuning.vocabulary import Vocabulary
from protocol.strategies import FedMktSettings, LocalTraining, ServerSteps
from tests.cotuning.strategy_inputs import (
    LORA,
    device_inputs,
    only_a_message,
    same,
    sent,
    server_inputs,
    silent,
    tuned_alone,
)
from tests.tiny_models import tiny_examples, tiny_language_model

PRIVATE = tiny_examples(12)
PROBE = tiny_examples(6, start=200)
TRAINING = LocalTraining(steps=6, batch_size=4, learning_rate=1e-2, max_length=64)
SLMS = ("gpt2", "qwen2", "llama")


def settings(**changes: Any) -> FedMktSettings:
    values: dict[str, Any] = {
        "slm_lora": LORA,
        "llm_lora": LORA,
        "training": TRAINING,
        "transfer_steps": 4,
        "top_k": 16,
        "server": ServerSteps(steps=4, batch_size=4, max_length=64, llm_learning_rate=1e-2),
    }
    return FedMktSettings(**values | changes)


def device(
    slm: LanguageModel,
    chosen: FedMktSettings | None = None,
    *,
    private: Sequence[Example] = PRIVATE,
    llm_logits: Message | None = None,
    **changes: Any,
) -> DeviceResult:
    values: dict[str, Any] = {"probe": PROBE, "message": llm_logits}
    values["llm_vocabulary"] = vocabulary_of(tiny_language_model("llama"))
    return FedMkt(chosen or settings()).device_step(device_inputs(slm, private, **values | changes))


def server(
    llm: LanguageModel, messages: Sequence[DeviceMessage], chosen: FedMktSettings | None = None
) -> tuple[ServerResult, list[int]]:
    """What the server makes of the messages, and the number of rows on which each device taught."""
    served = FedMkt(chosen or settings()).server_step(server_inputs(llm=llm, probe=PROBE, device_messages=messages))
    assert served.teacher is not None
    assert served.teacher.num_probe_rows == len(PROBE)
    return served, served.teacher.llm_rows


def omega(result: ServerResult) -> AdapterState:
    assert result.llm_adapter is not None
    return result.llm_adapter


def vocabulary_of(lm: LanguageModel) -> Vocabulary:
    """What the other side knows of a model: its tokenizer."""
    return Vocabulary.of(lm.tokenizer)


def read(message: Message | None, lm: LanguageModel, **changes: Any) -> Received:
    """What the other side makes of it."""
    assert message is not None
    chosen = settings(**changes)
    return fedmkt.parse_logits(
        message.tensors, message.metadata, vocabulary=vocabulary_of(lm), probe=PROBE, settings=chosen
    )


def said(lm: LanguageModel, probe: Sequence[Example] = PROBE) -> Message:
    """The logits of a model as it stands."""
    tensors, metadata = probe_payload(lm, probe, top_k=16, temperature=1.0, max_length=64, values="float16")
    return Message(tensors | {"losses": row_losses(lm, probe, max_length=64)}, metadata)


def from_device(lm: LanguageModel) -> DeviceMessage:
    """The same, of a device."""
    return sent(said(lm), lm, num_examples=len(PRIVATE))


@cache
def knowing(name: str) -> LanguageModel:
    """A model that knows the probe rows by heart: it teaches whoever does not. Nobody may change it."""
    lm = tiny_language_model(name)
    lm.model.requires_grad_(True)
    batch = EncodedRows(lm, PROBE, max_length=64).batch(range(len(PROBE)))
    with isolated_generators(0):
        optimizer = torch.optim.AdamW(lm.model.parameters(), lr=2e-2)
        for _ in range(40):
            optimizer.zero_grad()
            lm.model(
                input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, labels=batch.labels_BT
            ).loss.backward()
            optimizer.step()
    lm.model.requires_grad_(False)
    return lm


def test_the_rows_kept_and_who_teaches_them_by_hand() -> None:
    nan, inf = math.nan, math.inf
    losses_DN = torch.tensor(
        [
            [1.0, 2.0, 0.5, 1.0, nan, inf, 1.0, 0.1, nan],
            [0.5, 2.0, 0.5, 2.0, 3.0, nan, 1.0, 0.2, inf],
        ]
    )
    own_N = torch.tensor([0.8, 2.0, 0.6, 0.9, 4.0, 5.0, inf, nan, 1.0])
    # least; a tie with the student's own is not better; a tie of two: the first; nobody; one is no number; neither is a
    # finite one; the student's own is not finite, twice; neither is finite.
    assert fedmkt.select_rows(losses_DN, own_N) == {0: 1, 2: 0, 4: 1}
    assert fedmkt.select_rows(torch.zeros(0, 9), own_N) == {}


def test_selection_by_its_definition() -> None:
    generator = torch.Generator().manual_seed(3)
    losses_DN = torch.rand(4, 50, generator=generator, dtype=torch.float64)
    own_N = torch.rand(50, generator=generator, dtype=torch.float64)
    expected = {}
    for row in range(50):
        column = [float(torch.tensor(float(loss), dtype=torch.float32)) for loss in losses_DN[:, row]]
        best = min(range(4), key=lambda teacher: (column[teacher], teacher))
        if column[best] < float(own_N[row].float()):
            expected[row] = best
    assert 0 < len(expected) < 50
    assert fedmkt.select_rows(losses_DN, own_N) == expected
    order = [2, 0, 3, 1]
    moved = fedmkt.select_rows(losses_DN[order], own_N)
    assert {row: order[place] for row, place in moved.items()} == expected


def test_losses_of_other_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"each of 3 rows, got shape \[2, 4\]"):
        fedmkt.select_rows(torch.zeros(2, 4), torch.zeros(3))


@pytest.mark.parametrize("alignment", ["mined_dtw", "fold"])
@pytest.mark.parametrize("slm_name", ["gpt2", "qwen2", "bloom", "opt", "llama"])
def test_a_round_with_every_pair_of_architecture_and_tokenizer(slm_name: str, alignment: str) -> None:
    slm, llm = tiny_language_model(slm_name), tiny_language_model("llama", seed=1)
    chosen = settings(token_alignment=alignment, min_coverage=0.7)
    first = device(slm, chosen)
    message = only_a_message(first)
    assert first.domain_adapter is None
    assert set(first.losses) == {"slm_ce"}
    assert first.num_examples == len(PRIVATE)
    served, _ = server(llm, [sent(message, slm, num_examples=len(PRIVATE))], chosen)
    term = "kl" if alignment == "fold" else "mined"
    stages: list[str] = []
    # The teacher of the second round knows the probe rows, so that there is something to learn.
    second = device(
        slm,
        chosen,
        slm_adapter=first.slm_adapter,
        llm_logits=said(knowing("llama")),
        round_number=2,
        on_progress=lambda stage, *_: stages.append(stage),
    )
    assert stages == ["transfer_from_llm"] * 4 + ["local_tuning"] * 6
    assert set(second.losses) == {"slm_ce", "slm_transfer_ce", f"slm_transfer_{term}"}
    assert all(math.isfinite(value) and value >= 0 for value in second.losses.values())
    assert (second.alignment is not None) == (alignment == "fold")
    assert read(served.message, llm).payload.num_classes == llm.table.num_tokens


@pytest.mark.parametrize("alignment", ["mined_dtw", "fold"])
def test_a_teacher_that_knows_better_makes_the_student_better(alignment: str) -> None:
    llm, knows, ignorant = tiny_language_model("llama", seed=1), knowing("gpt2"), tiny_language_model("qwen2")
    chosen = settings(
        token_alignment=alignment,
        ce_weight=0.0,
        server=ServerSteps(steps=30, batch_size=4, max_length=64, llm_learning_rate=1e-2),
    )
    served, rows_taught = server(llm, [from_device(ignorant), from_device(knows)], chosen)
    assert rows_taught[1] == len(PROBE)
    with adapted(llm, lora_config(llm, **LORA.model_dump()), {"llm": omega(served)}) as lent:
        after = row_losses(lent, PROBE, max_length=64)
    before = row_losses(llm, PROBE, max_length=64)
    assert (after < before - 0.04).all()


def test_only_rows_on_which_a_device_does_better_are_trained_on() -> None:
    """The teacher knows four rows of six; the LLM's training is cross-entropy and targets on those alone."""
    llm, knows = knowing("llama"), from_device(tiny_language_model("gpt2"))
    served, rows_taught = server(llm, [knows])
    assert (rows_taught, served.losses) == ([0], {})
    untrained, nobody = server(llm, [])
    assert same(omega(served), omega(untrained))
    assert (nobody, untrained.losses) == ([], {})
    everything, _ = server(llm, [knows], settings(transfer_rows="all", token_alignment="fold"))
    assert set(everything.losses) == {"llm_transfer_ce"}
    assert not same(omega(everything), omega(untrained))


@pytest.mark.parametrize("alignment", ["mined_dtw", "fold"])
def test_without_weight_for_the_teacher_it_is_cross_entropy_bit_for_bit(alignment: str) -> None:
    llm = tiny_language_model("llama", seed=1)
    chosen = settings(ce_weight=1.0, token_alignment=alignment, transfer_rows="all")
    served, _ = server(llm, [from_device(knowing("gpt2"))], chosen)
    config = lora_config(llm, **LORA.model_dump())
    with adapted(llm, config, {"llm": derive_seed(9, "llm_adapter")}) as lent:
        activate(lent, ["llm"], trainable=["llm"])
        tune_adapter(
            lent,
            "llm",
            EncodedRows(lent, PROBE, max_length=64),
            draw_batches(row_sizes(PROBE), batch_size=4, steps=4, seed=derive_seed(9, "transfer_rows", 1)),
            learning_rate=1e-2,
            betas=(0.9, 0.95),
            seed=derive_seed(9, "transfer_to_llm", 1),
            stage="plain",
            on_progress=silent,
        )
        expected = adapter_state(lent, "llm")
    assert same(omega(served), expected)
    other, _ = server(llm, [from_device(knowing("gpt2"))], settings(token_alignment=alignment, transfer_rows="all"))
    assert not same(omega(other), expected)


def test_without_the_llms_logits_a_device_is_the_standalone_baseline_bit_for_bit() -> None:
    slm = tiny_language_model("gpt2")
    alone = tuned_alone(device_inputs(slm, PRIVATE), TRAINING)
    assert same(device(slm, settings(adam_beta2=0.999)).slm_adapter, alone)
    assert not same(device(slm).slm_adapter, alone)
    taught = device(slm, settings(adam_beta2=0.999, transfer_steps=0), llm_logits=said(knowing("llama")))
    assert same(taught.slm_adapter, alone)


def test_equal_arguments_give_equal_bits_and_models_come_back_as_they_went() -> None:
    slm, llm = tiny_language_model("gpt2"), tiny_language_model("llama", seed=1)
    weights = {name: tensor.clone() for name, tensor in slm.model.state_dict().items()}
    logits = said(knowing("llama"))
    generator = torch.get_rng_state()
    first, again, other = (device(slm, llm_logits=logits, seed=seed) for seed in (9, 9, 10))
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in slm.model.state_dict().items())
    assert same(first.slm_adapter, again.slm_adapter)
    one, other_one = only_a_message(first), only_a_message(again)
    assert same(one.tensors, other_one.tensors)
    assert (first.losses, one.metadata) == (again.losses, other_one.metadata)
    assert not same(first.slm_adapter, other.slm_adapter)
    (served, _), (repeated, _) = (server(llm, [from_device(knowing("gpt2"))]) for _ in range(2))
    assert same(omega(served), omega(repeated))
    assert served.message is not None
    assert repeated.message is not None
    assert same(served.message.tensors, repeated.message.tensors)


@pytest.mark.parametrize("alignment", ["mined_dtw", "fold"])
def test_the_order_of_the_devices_does_not_matter(alignment: str) -> None:
    llm = tiny_language_model("llama", seed=1)
    devices = [from_device(lm) for lm in (knowing("gpt2"), knowing("qwen2"), tiny_language_model("opt"))]
    chosen = settings(token_alignment=alignment)
    served, rows_taught = server(llm, devices, chosen)
    assert sum(count > 0 for count in rows_taught) > 1
    moved, moved_rows = server(llm, devices[::-1], chosen)
    assert moved_rows == rows_taught[::-1]
    if alignment == "mined_dtw":
        assert same(omega(moved), omega(served))
    for name, tensor in omega(served).items():  # the sum over devices is rounded in another order
        torch.testing.assert_close(omega(moved)[name], tensor, atol=2e-3, rtol=1e-2)


def test_the_last_transfer_is_the_first_half_of_a_round_that_is_not_held() -> None:
    slm, logits = tiny_language_model("gpt2"), said(knowing("llama"))
    vocabulary = vocabulary_of(knowing("llama"))
    given = device_inputs(slm, [], probe=PROBE, message=logits, llm_vocabulary=vocabulary, round_number=2)
    last = FedMkt(settings()).last_step(given)
    assert last is not None
    assert (last.message, last.num_examples) == (None, 0)
    assert set(last.losses) == {"slm_transfer_ce", "slm_transfer_mined"}
    whole = device(slm, llm_logits=logits, round_number=2)
    local_only = device(slm, slm_adapter=last.slm_adapter, round_number=2)
    assert same(whole.slm_adapter, local_only.slm_adapter)


def test_a_byte_of_text_counts_the_same_in_every_tokenizer() -> None:
    """A teacher whose tokens are many looks good by the token and not by the byte."""
    llm = knowing("llama")
    own_N = row_losses(llm, PROBE, max_length=64)
    gpt2 = tiny_language_model("gpt2")
    teacher = read(said(gpt2), gpt2)
    student = fedmkt.student.Student(llm, "llm", PROBE, settings(selection_unit="byte"))
    tokens_N = torch.tensor([len(ids) for ids in _response_ids(llm)])
    teacher_tokens_N = torch.bincount(teacher.places.sample_S)
    assert not torch.equal(tokens_N, teacher_tokens_N)
    sums_N = teacher.losses_N * teacher_tokens_N
    expected = [row for row in range(len(PROBE)) if sums_N[row] < own_N[row] * tokens_N[row]]
    assert sorted(student.teachers([teacher])) == expected


def _response_ids(lm: LanguageModel) -> list[list[int]]:
    labels_BT = EncodedRows(lm, PROBE, max_length=64).batch(range(len(PROBE))).labels_BT
    return [[index for index in row.tolist() if index >= 0] for row in labels_BT]


def test_no_text_and_no_weights_leave() -> None:
    slm = tiny_language_model("gpt2")
    message = only_a_message(device(slm))
    assert set(message.tensors) == {"ids", "values", "tail", "starts", "digest", "losses"}
    assert (message.tensors["losses"].dtype, message.tensors["losses"].shape) == (torch.float32, (6,))
    assert message.metadata["fingerprint"] == slm.table.fingerprint
    # Nothing of it is a function of the private rows but through the model: other rows, same shapes.
    other = only_a_message(device(slm, private=tiny_examples(12, start=40)))
    assert {name: tensor.shape for name, tensor in message.tensors.items()} == {
        name: tensor.shape for name, tensor in other.tensors.items()
    }


def test_logits_of_another_tokenizer_or_setting_are_refused() -> None:
    gpt2 = tiny_language_model("gpt2")
    message = device(gpt2).message
    with pytest.raises(PayloadError, match="header field 'fingerprint'"):
        read(message, tiny_language_model("qwen2"))
    with pytest.raises(PayloadError, match="classes kept of each distribution: expected 8, received 16"):
        read(message, gpt2, top_k=8)
    with pytest.raises(PayloadError, match=r"temperature: expected 2.0, received 1.0"):
        read(message, gpt2, temperature=2.0)


@pytest.mark.parametrize("values", ["int7", "int8", "float16"])
def test_losses_that_the_distributions_contradict_are_refused(values: str) -> None:
    for lm in (knowing("gpt2"), tiny_language_model("gpt2")):
        tensors, metadata = probe_payload(lm, PROBE, top_k=16, temperature=1.0, max_length=64, values=values)  # type: ignore[arg-type]
        exact_N = row_losses(lm, PROBE, max_length=64)
        assert torch.equal(read(Message(tensors | {"losses": exact_N}, metadata), lm).losses_N, exact_N)
        for claim in (exact_N - torch.tensor([0.0, 0.0, 2.7, 0.0, 0.0, 0.0]), exact_N / 0):
            row = 2 if claim.isfinite().all() else 0
            with pytest.raises(PayloadError, match=rf"loss of row {row}: expected a number of at least"):
                read(Message(tensors | {"losses": claim}, metadata), lm)
    for claim in (exact_N[1:], exact_N.double()):
        with pytest.raises(PayloadError, match=r"tensor 'losses': expected torch.float32 \[6\], received"):
            read(Message(tensors | {"losses": claim}, metadata), lm)
    with pytest.raises(PayloadError, match="received none"):
        read(Message(tensors, metadata), lm)


def test_whose_word_counts_is_a_setting() -> None:
    """A teacher that says it is worse than it is teaches nothing, unless its losses are computed."""
    llm, knows = tiny_language_model("llama", seed=1), from_device(knowing("gpt2"))
    worse = {"losses": knows.tensors["losses"] + 100}
    modest = replace(knows, tensors={**knows.tensors, **worse})
    assert server(llm, [modest])[1] == [0]
    assert server(llm, [modest], settings(losses="computed"))[1] == [6]


def test_an_empty_probe_set_is_refused() -> None:
    with pytest.raises(ValueError, match="expected at least one probe row, got none"):
        device(tiny_language_model("gpt2"), probe=[])


def test_tokenizers_that_do_not_align_are_refused_before_any_training() -> None:
    calls: list[str] = []
    probe = [*PROBE[:-1], Example("x", "Say it.", "", "ﬁn ½ x")]
    with pytest.raises(CoverageTooLow, match="expected at least 1"):
        device(
            tiny_language_model("bloom"),
            settings(token_alignment="fold", min_coverage=1.0),
            probe=probe,
            llm_logits=said(tiny_language_model("llama"), probe),
            on_progress=lambda stage, *_: calls.append(stage),
        )
    assert calls == []
