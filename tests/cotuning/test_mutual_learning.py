from typing import Any

import pytest
import torch

from cotuning.adapters import activate, adapted, adapter_state, lora_config
from cotuning.encoded_rows import EncodedRows
from cotuning.encoding import encode_batch
from cotuning.examples import Example, render_prompt
from cotuning.language_model import LanguageModel
from cotuning.mutual_learning import Party, learn_mutually
from cotuning.probe_logits import choose_teachers, make_teacher, parse_probe_payload, probe_payload, probe_places
from cotuning.shared_rows import share_rows
from tests.tiny_models import tiny_examples, tiny_language_model

ROWS = tiny_examples(6)


def silent(stage: str, step: int, steps: int, losses: dict[str, float]) -> None:
    pass


def opinionated(name: str, seed: int = 0) -> LanguageModel:
    lm = tiny_language_model(name, seed=seed)
    for tensor in lm.model.parameters():
        if tensor.dim() > 1:
            tensor.mul_(12)
    return lm


def learn(
    a: LanguageModel,
    b: LanguageModel,
    rows: list[Example],
    batches: list[list[int]],
    *,
    weight: float = 1.0,
    **options: Any,
) -> tuple[dict[str, float], Any, Any]:
    """One call of mutual learning between two models; reports and both adapters."""
    teacher = options.pop("teacher", None)
    configs = [lora_config(lm, rank=2, alpha=4.0) for lm in (a, b)]
    with adapted(a, configs[0], {"x_a": 1}) as lent_a, adapted(b, configs[1], {"x_b": 2}) as lent_b:
        activate(lent_a, ["x_a"], trainable=["x_a"])
        activate(lent_b, ["x_b"], trainable=["x_b"])
        encoded = [EncodedRows(lm, rows, max_length=64) for lm in (lent_a, lent_b)]
        losses = learn_mutually(
            Party("a", lent_a, "x_a", 1e-2, weight, teacher),
            Party("b", lent_b, "x_b", 1e-2, weight),
            share_rows(encoded[0], encoded[1], batches, min_coverage=0.8),
            seed=0,
            stage="test",
            on_progress=silent,
            **options,
        )
        return losses, adapter_state(lent_a, "x_a"), adapter_state(lent_b, "x_b")


def response_log_probs(lm: LanguageModel, rows: list[Example], temperature: float = 1.0) -> tuple[Any, Any]:
    """Log-probabilities before every response token of all rows, and the tokens; no batch, no padding."""
    logs, targets = [], []
    for row in rows:
        batch = encode_batch(lm.tokenizer, lm.table, [render_prompt(lm.tokenizer, row)], [row.output], max_length=64)
        with torch.no_grad():
            logits_TV = lm.model(input_ids=batch.input_ids_BT).logits[0, :, : lm.table.num_tokens]
        taught_T = batch.labels_BT[0, 1:] >= 0
        logs.append((logits_TV[:-1][taught_T] / temperature).log_softmax(-1))
        targets.append(batch.labels_BT[0, 1:][taught_T])
    return torch.cat(logs), torch.cat(targets)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_terms_by_their_plain_formulas_where_tokenizers_are_equal(temperature: float) -> None:
    a, b = opinionated("llama"), opinionated("llama_proxy")
    losses, _, _ = learn(a, b, ROWS, [list(range(6))], temperature=temperature)
    for name, student, teacher in (("a", a, b), ("b", b, a)):
        logs_NV, target_N = response_log_probs(student, ROWS)
        assert losses[f"{name}_ce"] == pytest.approx(-float(logs_NV.gather(1, target_N[:, None]).mean()), rel=1e-4)
        student_NV, _ = response_log_probs(student, ROWS, temperature)
        teacher_NV, _ = response_log_probs(teacher, ROWS, temperature)
        divergence = (teacher_NV.exp() * (teacher_NV - student_NV)).sum(-1).mean() * temperature**2
        assert losses[f"{name}_kl"] == pytest.approx(float(divergence), rel=1e-4)


def test_swapping_the_parties_swaps_everything() -> None:
    a, b = opinionated("gpt2"), opinionated("bloom")
    forward, state_a, state_b = learn(a, b, ROWS, [[0, 1, 2], [3, 4, 5]], divergence="reverse_kl")
    configs = [lora_config(lm, rank=2, alpha=4.0) for lm in (b, a)]
    with adapted(b, configs[0], {"x_b": 2}) as lent_b, adapted(a, configs[1], {"x_a": 1}) as lent_a:
        activate(lent_a, ["x_a"], trainable=["x_a"])
        activate(lent_b, ["x_b"], trainable=["x_b"])
        rows = [EncodedRows(lm, ROWS, max_length=64) for lm in (lent_b, lent_a)]
        shared = share_rows(rows[0], rows[1], [[0, 1, 2], [3, 4, 5]], min_coverage=0.8)
        backward = learn_mutually(
            Party("b", lent_b, "x_b", 1e-2, 1.0),
            Party("a", lent_a, "x_a", 1e-2, 1.0),
            shared,
            divergence="reverse_kl",
            seed=0,
            stage="test",
            on_progress=silent,
        )
        assert backward.keys() == forward.keys()
        assert all(backward[name] == pytest.approx(forward[name], rel=1e-4) for name in forward)
        for name, state in (("x_a", state_a), ("x_b", state_b)):
            swapped = adapter_state(lent_a if name == "x_a" else lent_b, name)
            for key in state:
                torch.testing.assert_close(swapped[key], state[key], rtol=1e-3, atol=1e-4)


def test_padding_does_not_change_the_terms() -> None:
    a, b = opinionated("llama"), opinionated("qwen2")
    long = Example("long", "Count. " * 12, "", "one two three four")
    alone, _, _ = learn(a, b, [*ROWS, long], [[0]])
    # The same row twice next to a long one: means over tokens change, so compare through sums of three single rows.
    both, _, _ = learn(a, b, [*ROWS, long], [[0, 6]])
    other, _, _ = learn(a, b, [*ROWS, long], [[6]])
    logs = [response_log_probs(a, [row])[1] for row in (ROWS[0], long)]
    counts = [len(each) for each in logs]
    expected = (alone["a_ce"] * counts[0] + other["a_ce"] * counts[1]) / sum(counts)
    assert both["a_ce"] == pytest.approx(expected, rel=1e-4)


def test_learning_from_each_other_brings_two_models_closer() -> None:
    a, b = opinionated("gpt2"), opinionated("qwen2")
    first, _, _ = learn(a, b, ROWS, [list(range(6))])
    last, _, _ = learn(a, b, ROWS, [list(range(6))] * 40)
    assert last["a_kl"] < 0.85 * first["a_kl"]
    assert last["b_kl"] < 0.85 * first["b_kl"]


TERMS = {"fold": "kl", "uld": "uld", "gold": "gold", "mined_dtw": "mined", "alm": "alm"}


@pytest.mark.parametrize("matching", TERMS)
def test_every_matching_lowers_its_own_term(matching: str) -> None:
    first, _, _ = learn(opinionated("gpt2"), opinionated("bloom"), ROWS, [list(range(6))], matching=matching)
    # At a great weight, so that it is not the cross-entropy that lowers it.
    last, _, _ = learn(
        opinionated("gpt2"), opinionated("bloom"), ROWS, [list(range(6))] * 25, matching=matching, weight=1e3
    )
    for party in ("a", "b"):
        assert last[f"{party}_{TERMS[matching]}"] < 0.95 * first[f"{party}_{TERMS[matching]}"]


@pytest.mark.parametrize("matching", TERMS)
def test_no_matching_lets_padding_leak(matching: str) -> None:
    """The mean over two rows of unlike length lies between those of each row alone, by the same numbers of places."""
    a, b = opinionated("gpt2"), opinionated("opt")
    rows = [*ROWS, Example("long", "Count. " * 12, "", "one two three four")]
    term = f"a_{TERMS[matching]}"
    one, other, both = (learn(a, b, rows, [batch], matching=matching)[0][term] for batch in ([0], [6], [0, 6]))
    share = (both - other) / (one - other)
    twice = learn(a, b, rows, [[0, 6, 6]], matching=matching)[0][term]
    # n and m places: share n / (n + m), and n / (n + 2m) with the second row twice.
    assert twice == pytest.approx(other + (one - other) * share / (2 - share), rel=1e-4)


def test_the_likelihood_term_changes_what_is_learnt_beside_the_fold() -> None:
    a, b = opinionated("gpt2"), opinionated("qwen2")
    plain, state, _ = learn(a, b, ROWS, [list(range(6))] * 3)
    losses, other, _ = learn(a, b, ROWS, [list(range(6))] * 3, span_likelihood_weight=0.5)
    assert losses.keys() - plain.keys() == {"a_span_likelihood", "b_span_likelihood"}
    assert any(not torch.equal(state[name], other[name]) for name in state)


def test_ce_only_is_mutual_learning_at_weight_zero() -> None:
    a, b = opinionated("gpt2"), opinionated("qwen2")
    losses, state_a, state_b = learn(a, b, ROWS, [[0, 1, 2], [3, 4, 5]], matching="ce_only")
    expected, other_a, other_b = learn(a, b, ROWS, [[0, 1, 2], [3, 4, 5]], weight=0.0)
    assert losses == expected
    assert all(torch.equal(state_a[name], other_a[name]) for name in state_a)
    assert all(torch.equal(state_b[name], other_b[name]) for name in state_b)


def test_a_received_teacher_equals_the_plain_divergence_when_all_classes_travel() -> None:
    student, teacher = opinionated("llama"), opinionated("llama", seed=1)
    num_tokens = teacher.table.num_tokens
    tensors, metadata = probe_payload(teacher, ROWS, top_k=num_tokens, temperature=1.0, max_length=64)
    places = probe_places(teacher, ROWS, max_length=64)
    payload = parse_probe_payload(
        tensors, metadata, proxy=teacher, probe=ROWS, places=places, top_k=num_tokens, temperature=1.0
    )
    weights_DN = choose_teachers(torch.ones(1, 6), torch.full((6,), 1e9), "least_ce")
    received = make_teacher([payload], weights_DN, {sample: sample for sample in range(6)}, weight=0.5)
    losses, _, _ = learn(student, opinionated("gpt2"), ROWS, [[4, 0, 2]], teacher=received)
    rows = [ROWS[index] for index in (4, 0, 2)]
    student_NV, _ = response_log_probs(student, rows)
    teacher_NV, _ = response_log_probs(teacher, rows)
    expected = float((teacher_NV.exp() * (teacher_NV - student_NV)).sum(-1).mean())
    assert losses["a_teacher_kl"] == pytest.approx(expected, rel=0.02)  # 8-bit log-probabilities


def test_a_batch_without_a_taught_row_has_no_teacher_term() -> None:
    student, teacher = opinionated("llama"), opinionated("llama", seed=1)
    tensors, metadata = probe_payload(teacher, ROWS[:2], top_k=16, temperature=1.0, max_length=64)
    places = probe_places(teacher, ROWS[:2], max_length=64)
    payload = parse_probe_payload(
        tensors, metadata, proxy=teacher, probe=ROWS[:2], places=places, top_k=16, temperature=1.0
    )
    weights_DN = choose_teachers(torch.ones(1, 2), torch.full((2,), 1e9), "least_ce")
    received = make_teacher([payload], weights_DN, {0: 4, 1: 5}, weight=0.5)
    without, _, _ = learn(student, opinionated("gpt2"), ROWS, [[0, 1]], teacher=received)
    assert "a_teacher_kl" not in without
    within, _, _ = learn(student, opinionated("gpt2"), ROWS, [[0, 5]], teacher=received)
    assert within["a_teacher_kl"] > 0
