import math
from dataclasses import replace

import pytest
import torch

from cotuning.encoding import encode_batch
from cotuning.examples import Example, render_prompt, rows_digest
from cotuning.language_model import LanguageModel
from cotuning.payload import PayloadError, PayloadRows
from cotuning.probe_logits import choose_teachers, make_teacher, parse_probe_payload, probe_payload, row_losses
from tests.tiny_models import tiny_examples, tiny_language_model

PROBE = [*tiny_examples(5, start=80), Example("é", "Say it.", "", "café")]


def opinionated(seed: int) -> LanguageModel:
    lm = tiny_language_model("llama", seed=seed)
    for tensor in lm.model.parameters():
        if tensor.dim() > 1:
            tensor.mul_(12)
    return lm


def payload_of(lm: LanguageModel, probe: list[Example] = PROBE, top_k: int = 16) -> PayloadRows:
    tensors, metadata = probe_payload(lm, probe, top_k=top_k, temperature=1.0, max_length=64)
    return parse_probe_payload(tensors, metadata, proxy=lm, probe=probe, top_k=top_k, temperature=1.0)


def whole_log_probs(lm: LanguageModel, row: Example) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities before each response token, and the tokens, the plain way."""
    batch = encode_batch(lm.tokenizer, lm.table, [render_prompt(lm.tokenizer, row)], [row.output], max_length=64)
    with torch.no_grad():
        logs_TV = lm.model(input_ids=batch.input_ids_BT).logits[0, :, : lm.table.num_tokens].log_softmax(-1)
    target_T = batch.labels_BT[0, 1:]
    return logs_TV[:-1][target_T >= 0], target_T[target_T >= 0]


def test_row_losses_by_their_definition() -> None:
    lm = opinionated(0)
    expected = []
    for row in PROBE:
        logs_NV, target_N = whole_log_probs(lm, row)
        expected.append(-float(logs_NV.gather(1, target_N[:, None]).mean()))
    assert row_losses(lm, PROBE, max_length=64).tolist() == pytest.approx(expected, rel=1e-4)


def test_the_payload_holds_the_models_own_distributions() -> None:
    lm = opinionated(0)
    payload = payload_of(lm)
    for sample, row in enumerate(PROBE):
        logs_NV, _ = whole_log_probs(lm, row)
        rows_S = (payload.sample_S == sample).nonzero().flatten()
        assert len(rows_S) == len(logs_NV)
        ids_SK = payload.ids_SK[rows_S]
        assert torch.equal(ids_SK[:, 0], logs_NV.argmax(-1))
        torch.testing.assert_close(
            payload.log_probs_SK[rows_S].exp(), logs_NV.gather(1, ids_SK).exp(), atol=0.02, rtol=0.05
        )
        assert int(payload.byte_start_S[rows_S][-1]) == len(row.output.encode())  # END is among them
    assert payload.losses_N.tolist() == pytest.approx(row_losses(lm, PROBE, max_length=64).tolist())


def test_a_payload_that_was_not_asked_for_is_refused() -> None:
    lm = opinionated(0)
    tensors, metadata = probe_payload(lm, PROBE, top_k=16, temperature=1.0, max_length=64)
    options = {"proxy": lm, "probe": PROBE, "top_k": 16, "temperature": 1.0}
    with pytest.raises(PayloadError, match="classes kept of each distribution: expected 8, received 16"):
        parse_probe_payload(tensors, metadata, **options | {"top_k": 8})
    with pytest.raises(PayloadError, match=r"temperature: expected 2.0, received 1.0"):
        parse_probe_payload(tensors, metadata, **options | {"temperature": 2.0})
    with pytest.raises(PayloadError, match="fingerprint"):
        parse_probe_payload(tensors, metadata, **options | {"proxy": tiny_language_model("gpt2")})
    with pytest.raises(PayloadError, match="probe_set"):
        parse_probe_payload(tensors, metadata, **options | {"probe": PROBE[:-1]})


def test_an_empty_probe_set_is_refused() -> None:
    with pytest.raises(ValueError, match="expected at least one probe row"):
        probe_payload(opinionated(0), [], top_k=16, temperature=1.0, max_length=64)


def with_losses(losses: list[float]) -> PayloadRows:
    return replace(payload_of(opinionated(0)), losses_N=torch.tensor(losses))


def test_the_device_with_the_least_loss_teaches_where_it_beats_the_student() -> None:
    first = with_losses([1.0, 3.0, 1.0, 5.0, math.nan, 1.0])
    second = with_losses([2.0, 1.0, 1.0, 5.0, 1.0, math.nan])
    own_N = torch.tensor([4.0, 4.0, 0.5, 4.0, 4.0, 4.0])
    weights_DN = choose_teachers([first, second], own_N, "least_ce")
    assert weights_DN.tolist() == [[1, 0, 0, 0, 0, 1], [0, 1, 0, 0, 1, 0]]
    assert choose_teachers([first, second], own_N, "off").sum() == 0
    assert choose_teachers([], own_N, "least_ce").shape == (0, 6)


def test_the_mixture_weighs_those_who_beat_the_student_by_their_losses() -> None:
    first = with_losses([1.0, 3.0, 1.0, 5.0, 1.0, 1.0])
    second = with_losses([2.0, 1.0, 1.0, 5.0, 9.0, math.nan])
    weights_DN = choose_teachers([first, second], torch.tensor([4.0, 2.0, 0.5, 4.0, 4.0, 4.0]), "ce_weighted")
    share = math.exp(-1) / (math.exp(-1) + math.exp(-2))
    expected = [[share, 0, 0, 0, 1, 1], [1 - share, 1, 0, 0, 0, 0]]
    torch.testing.assert_close(weights_DN, torch.tensor(expected))


def test_a_device_that_did_not_answer_a_row_teaches_none() -> None:
    payload = payload_of(opinionated(0))
    partial = payload.take((payload.sample_S != 2).nonzero().flatten())
    weights_DN = choose_teachers([partial], torch.full((6,), 1e9), "least_ce")
    assert weights_DN.tolist() == [[1, 1, 0, 1, 1, 1]]


@pytest.mark.parametrize("mode", ["least_ce", "ce_weighted"])
def test_a_teacher_has_the_chosen_rows_in_order(mode: str) -> None:
    payloads = [payload_of(opinionated(seed)) for seed in (0, 1, 2)]
    own_N = torch.full((6,), 1e9)
    weights_DN = choose_teachers(payloads, own_N, mode)  # type: ignore[arg-type]
    teacher = make_teacher(payloads, weights_DN, {sample: 100 + sample for sample in range(6)}, weight=0.7)
    assert teacher is not None
    assert teacher.sample_of_row == {100 + sample: sample for sample in range(6)}
    assert teacher.weight == 0.7
    sample_S = teacher.payload.sample_S
    assert torch.equal(sample_S, sample_S.sort().values)
    per_position = 1 if mode == "least_ce" else 3
    assert len(sample_S) == per_position * len(payloads[0].sample_S)
    sums_N = torch.zeros(6).index_add_(0, sample_S, teacher.weights_S)
    torch.testing.assert_close(sums_N, torch.bincount(payloads[0].sample_S).float())


def test_nobody_good_enough_is_no_teacher() -> None:
    payloads = [payload_of(opinionated(0))]
    weights_DN = choose_teachers(payloads, torch.zeros(6), "least_ce")
    assert make_teacher(payloads, weights_DN, {sample: sample for sample in range(6)}, weight=1.0) is None


def test_a_probe_sets_digest_names_what_models_read() -> None:
    renamed = [replace(row, id="other", task="other") for row in PROBE]
    assert rows_digest(renamed) == rows_digest(PROBE)
    assert rows_digest(PROBE[::-1]) != rows_digest(PROBE)
    moved = [replace(PROBE[0], instruction=PROBE[0].instruction + "x", input=PROBE[0].input[1:]), *PROBE[1:]]
    assert rows_digest(moved) != rows_digest(PROBE)
