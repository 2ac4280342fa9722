import math
from dataclasses import replace

import pytest
import torch

from cotuning.encoding import encode_batch
from cotuning.examples import Example, render_prompt, rows_digest
from cotuning.language_model import LanguageModel
from cotuning.payload import PayloadError, PayloadRows
from cotuning.probe_logits import (
    ProbePlaces,
    choose_teachers,
    least_payload_losses,
    make_teacher,
    parse_probe_payload,
    payload_losses,
    probe_payload,
    probe_places,
    row_losses,
)
from tests.tiny_models import tiny_examples, tiny_language_model

PROBE = [*tiny_examples(5, start=80), Example("é", "Say it.", "", "café")]


def opinionated(seed: int) -> LanguageModel:
    lm = tiny_language_model("llama", seed=seed)
    for tensor in lm.model.parameters():
        if tensor.dim() > 1:
            tensor.mul_(12)
    return lm


def payload_of(
    lm: LanguageModel, probe: list[Example] = PROBE, top_k: int = 16, temperature: float = 1.0
) -> PayloadRows:
    tensors, metadata = probe_payload(lm, probe, top_k=top_k, temperature=temperature, max_length=64)
    places = probe_places(lm, probe, max_length=64)
    return parse_probe_payload(
        tensors, metadata, proxy=lm, probe=probe, places=places, top_k=top_k, temperature=temperature
    )


def losses_of(payload: PayloadRows, lm: LanguageModel) -> list[float]:
    return payload_losses(payload, probe_places(lm, PROBE, max_length=64), len(PROBE)).tolist()


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


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_receiver_knows_each_rows_loss_without_being_told(temperature: float) -> None:
    lm = opinionated(0)
    payload = payload_of(lm, top_k=lm.table.num_tokens, temperature=temperature)
    told = row_losses(lm, PROBE, max_length=64).tolist()
    assert losses_of(payload, lm) == pytest.approx(told, rel=0.02 * temperature)  # 8-bit log-probabilities


def test_a_token_outside_the_top_has_its_share_of_the_tail() -> None:
    lm = opinionated(0)
    payload = payload_of(lm, top_k=4)
    places = probe_places(lm, PROBE, max_length=64)
    rest = lm.table.num_tokens - 4
    sums, counts = [0.0] * len(PROBE), [0] * len(PROBE)
    for row, sample in enumerate(places.sample_S.tolist()):
        ids = payload.ids_SK[row].tolist()
        target = int(places.target_S[row])
        if target in ids:
            log_prob = float(payload.log_probs_SK[row, ids.index(target)])
        else:
            log_prob = math.log(float(payload.tail_S[row]) / rest)
        sums[sample] -= log_prob
        counts[sample] += 1
    expected = [total / count for total, count in zip(sums, counts, strict=True)]
    assert losses_of(payload, lm) == pytest.approx(expected, rel=1e-4)
    assert any(int(target) not in ids for target, ids in zip(places.target_S, payload.ids_SK.tolist(), strict=True))


@pytest.mark.parametrize("top_k", [1, 4, 360])
def test_the_least_loss_that_distributions_allow_is_below_the_models_own(top_k: int) -> None:
    lm = opinionated(0)
    payload, places = payload_of(lm, top_k=top_k), probe_places(lm, PROBE, max_length=64)
    least = least_payload_losses(payload, places, len(PROBE)).tolist()
    own = row_losses(lm, PROBE, max_length=64).tolist()
    assert all(bound <= loss + 0.1 for bound, loss in zip(least, own, strict=True))
    if top_k == 360:  # every id is kept: nothing is left to chance
        assert least == pytest.approx(own, rel=0.02)
    warm = replace(payload, temperature=2.0)
    assert least_payload_losses(warm, places, len(PROBE)).tolist() == [0.0] * len(PROBE)


def test_the_least_loss_by_hand() -> None:
    payload = PayloadRows(
        sample_S=torch.tensor([0, 0, 1]),
        byte_start_S=torch.tensor([0, 1, 0]),
        ids_SK=torch.tensor([[3, 1], [3, 1], [2, 0]]),
        log_probs_SK=torch.tensor([[0.6, 0.3], [0.5, 0.05], [0.6, 0.3]]).log(),
        tail_S=torch.tensor([0.1, 0.45, 0.1]),
        num_classes=9,
        temperature=1.0,
        fingerprint="f",
    )
    # Kept: 0.3. Not kept: at most the least kept one, 0.05. Not kept: at most the tail, 0.1 and what it may err.
    places = ProbePlaces(payload.sample_S, payload.byte_start_S, torch.tensor([1, 8, 8]))
    expected = [-(math.log(0.3) + math.log(0.05)) / 2, -math.log(0.1 + 2**-12)]
    assert least_payload_losses(payload, places, 3).tolist()[:2] == pytest.approx(expected, rel=1e-6)
    assert math.isnan(least_payload_losses(payload, places, 3)[2])


def test_places_are_the_response_tokens_in_order() -> None:
    lm = opinionated(0)
    places = probe_places(lm, PROBE, max_length=64)
    for sample, row in enumerate(PROBE):
        _, target_N = whole_log_probs(lm, row)
        assert torch.equal(places.target_S[places.sample_S == sample], target_N)


def test_a_payload_without_some_of_the_places_is_refused() -> None:
    lm = opinionated(0)
    tensors, metadata = probe_payload(lm, PROBE, top_k=16, temperature=1.0, max_length=64)
    places = probe_places(lm, PROBE, max_length=64)
    options = {"proxy": lm, "probe": PROBE, "places": places, "top_k": 16, "temperature": 1.0}
    by_row = ("ids", "values", "tail")
    fewer = {name: tensor[1:] if name in by_row else tensor.clone() for name, tensor in tensors.items()}
    fewer["starts"][0] &= 0b11111110  # the first row stands at the first byte
    wanted = len(places.sample_S)
    with pytest.raises(PayloadError, match=f"number of distributions: expected {wanted}, received {wanted - 1}"):
        parse_probe_payload(fewer, metadata, **options)
    moved_S = places.byte_start_S.clone()
    moved_S[0] += 1
    with pytest.raises(PayloadError, match="byte offsets of the distributions, at row 0: expected 1, received 0"):
        parse_probe_payload(tensors, metadata, **options | {"places": replace(places, byte_start_S=moved_S)})


def test_an_empty_probe_set_is_refused() -> None:
    with pytest.raises(ValueError, match="expected at least one probe row"):
        probe_payload(opinionated(0), [], top_k=16, temperature=1.0, max_length=64)


def test_the_device_with_the_least_loss_teaches_where_it_beats_the_student() -> None:
    losses_DN = torch.tensor([[1.0, 3.0, 1.0, 5.0, math.nan, 1.0], [2.0, 1.0, 1.0, 5.0, 1.0, math.nan]])
    own_N = torch.tensor([4.0, 4.0, 0.5, 4.0, 4.0, 4.0])
    weights_DN = choose_teachers(losses_DN, own_N, "least_ce")
    assert weights_DN.tolist() == [[1, 0, 0, 0, 0, 1], [0, 1, 0, 0, 1, 0]]
    assert choose_teachers(losses_DN, own_N, "off").sum() == 0
    assert choose_teachers(torch.zeros(0, 6), own_N, "least_ce").shape == (0, 6)


def test_the_mixture_weighs_those_who_beat_the_student_by_their_losses() -> None:
    losses_DN = torch.tensor([[1.0, 3.0, 1.0, 5.0, 1.0, 1.0], [2.0, 1.0, 1.0, 5.0, 9.0, math.nan]])
    weights_DN = choose_teachers(losses_DN, torch.tensor([4.0, 2.0, 0.5, 4.0, 4.0, 4.0]), "ce_weighted")
    share = math.exp(-1) / (math.exp(-1) + math.exp(-2))
    expected = [[share, 0, 0, 0, 1, 1], [1 - share, 1, 0, 0, 0, 0]]
    torch.testing.assert_close(weights_DN, torch.tensor(expected))


@pytest.mark.parametrize("mode", ["least_ce", "ce_weighted"])
def test_a_teacher_has_the_chosen_rows_in_order(mode: str) -> None:
    payloads = [payload_of(opinionated(seed)) for seed in (0, 1, 2)]
    own_N = torch.full((6,), 1e9)
    losses_DN = torch.tensor([losses_of(payload, opinionated(0)) for payload in payloads])
    weights_DN = choose_teachers(losses_DN, own_N, mode)  # type: ignore[arg-type]
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
    weights_DN = choose_teachers(torch.full((1, 6), 0.1), torch.zeros(6), "least_ce")
    assert make_teacher(payloads, weights_DN, {sample: sample for sample in range(6)}, weight=1.0) is None


def test_a_probe_sets_digest_names_what_models_read() -> None:
    renamed = [replace(row, id="other", task="other") for row in PROBE]
    assert rows_digest(renamed) == rows_digest(PROBE)
    assert rows_digest(PROBE[::-1]) != rows_digest(PROBE)
    moved = [replace(PROBE[0], instruction=PROBE[0].instruction + "x", input=PROBE[0].input[1:]), *PROBE[1:]]
    assert rows_digest(moved) != rows_digest(PROBE)
