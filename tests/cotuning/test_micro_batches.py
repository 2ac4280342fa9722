"""A step computed in micro-batches is the same step: every mean is over all of its tokens and spans, not over those of
the part that was in memory."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from cotuning.adapters import activate, adapted, adapter_parameters, lora_config
from cotuning.alignment import align
from cotuning.cross_entropy import cross_entropy, response_tokens
from cotuning.encoded_rows import EncodedRows
from cotuning.examples import Example
from cotuning.heads import Head
from cotuning.language_model import LanguageModel, hidden_states
from cotuning.mutual_learning import Party, Teacher, learn_mutually
from cotuning.probe_logits import choose_teachers, make_teacher, parse_probe_payload, probe_payload, probe_places
from cotuning.shared_rows import share_rows
from cotuning.training import Learner, Step, micro_batches, train
from cotuning.tuning import tune_adapter
from tests.cotuning.test_memory import larger, peak_bytes
from tests.cotuning.test_memory import rows as long_rows
from tests.tiny_models import tiny_examples, tiny_language_model, tiny_tokenizer

SPANLESS = Example("spanless", "Say.", "", "日本語" * 80)
"""Truncated on both sides before they have a boundary in common."""

ROWS = [
    *tiny_examples(3),
    SPANLESS,
    Example("empty", "Say nothing.", "", ""),
    Example("long", "Count.", "", "one two three four " * 3),
    Example("numbers", "Add.", "", "12 12345.67"),
]
BATCHES = [[0, 1, 2, 3, 4, 5, 6], [3, 5, 0, 4, 6, 2, 1], [6, 2, 4, 0, 1, 5, 3]]
MATCHINGS: dict[str, dict[str, Any]] = {
    "fold": {},
    "fold_and_likelihood": {"matching": "fold", "span_likelihood_weight": 0.5},
    "ce_only": {},
    "uld": {},
    "gold": {"divergence": "jsd"},
    "mined_dtw": {},
    "alm": {},
}


@dataclass
class Learnt:
    """What three steps of mutual learning report, have as gradients in the first one, and make of the adapters."""

    losses: dict[str, float]
    gradients: list[Tensor]
    adapters: list[Tensor]


def opinionated(lm: LanguageModel) -> LanguageModel:
    for tensor in lm.model.parameters():
        if tensor.dim() > 1:
            tensor.mul_(8)
    return lm


def unigram_model() -> LanguageModel:
    """Reads with a Unigram tokenizer; BLOOM, which has it among the tiny models, takes its softmax in float32."""
    tokenizer, config = tiny_tokenizer("unigram"), tiny_language_model("llama_proxy").model.config
    config.vocab_size = len(tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_config(config)
    return LanguageModel.of(model.eval().requires_grad_(False), tokenizer)


def received(seed: int) -> Teacher:
    """Another GPT-2's distributions on three of the rows."""
    lm = opinionated(tiny_language_model("gpt2", seed=seed))
    probe = [ROWS[0], ROWS[5], ROWS[6]]
    tensors, metadata = probe_payload(lm, probe, top_k=16, temperature=1.0, max_length=64)
    payload = parse_probe_payload(
        tensors,
        metadata,
        proxy=lm,
        probe=probe,
        places=probe_places(lm, probe, max_length=64),
        top_k=16,
        temperature=1.0,
    )
    weights_DN = choose_teachers(torch.ones(1, 3), torch.full((3,), 1e9), "least_ce")
    return make_teacher([payload], weights_DN, {0: 0, 1: 5, 2: 6}, weight=0.7)


def learn(
    micro_batch_size: int | None,
    *,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> Learnt:
    a, b = (opinionated(lm) for lm in (tiny_language_model("gpt2"), unigram_model()))
    teacher = options.pop("teacher", None)
    configs = [lora_config(lm, rank=2, alpha=4.0) for lm in (a, b)]
    gradients: list[Tensor] = []
    with adapted(a, configs[0], {"x_a": 1}) as lent_a, adapted(b, configs[1], {"x_b": 2}) as lent_b:
        for lent in (lent_a, lent_b):
            lent.model.to(dtype)
        activate(lent_a, ["x_a"], trainable=["x_a"])
        activate(lent_b, ["x_b"], trainable=["x_b"])
        parameters = [*adapter_parameters(lent_a, "x_a").values(), *adapter_parameters(lent_b, "x_b").values()]

        def keep_gradients(stage: str, step: int, *_: object) -> None:
            if step == 1:
                gradients.extend(each.grad.clone() for each in parameters if each.grad is not None)

        losses = learn_mutually(
            Party("a", lent_a, "x_a", 1e-2, 0.8, teacher),
            Party("b", lent_b, "x_b", 1e-2, 1.3),
            share_rows(
                EncodedRows(lent_a, ROWS, max_length=64),
                EncodedRows(lent_b, ROWS, max_length=64),
                BATCHES,
                min_coverage=0.0,
            ),
            gradient_clip=1e9,
            micro_batch_size=micro_batch_size,
            seed=0,
            stage="test",
            on_progress=keep_gradients,
            **options,
        )
        return Learnt(losses, gradients, [each.detach().clone() for each in parameters])


def assert_same(one: Learnt, other: Learnt) -> None:
    """Up to the order of float64 sums, and what three steps of AdamW make of it."""
    assert one.losses.keys() == other.losses.keys()
    for name, value in one.losses.items():
        assert other.losses[name] == pytest.approx(value, rel=1e-10, abs=1e-10)
    assert len(one.gradients) == len(one.adapters) == len(other.gradients)
    for tolerance, mine, theirs in (
        (1e-12, one.gradients, other.gradients),
        (1e-10, one.adapters, other.adapters),
    ):
        for expected, got in zip(mine, theirs, strict=True):
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_the_rows_hold_the_cases_that_matter() -> None:
    encoded = [EncodedRows(lm, ROWS, max_length=64) for lm in (tiny_language_model("gpt2"), unigram_model())]
    spans = [align(*(rows.batch([index]) for rows in encoded)).num_spans for index in range(len(ROWS))]
    tokens = [len(response_tokens(encoded[0].batch([index])).target_N) for index in range(len(ROWS))]
    assert spans[ROWS.index(SPANLESS)] == 0
    assert len(set(spans)) > 3
    assert len(set(tokens)) > 3
    assert [len(part) for part in micro_batches(BATCHES[0], 3)] == [3, 3, 1]


@pytest.mark.parametrize("matching", MATCHINGS)
def test_micro_batches_give_the_whole_batchs_losses_gradients_and_adapters(matching: str) -> None:
    options = {"matching": matching, "temperature": 1.5, "teacher": received(seed=1)} | MATCHINGS[matching]
    whole = learn(None, **options)
    assert "a_teacher_kl" in whole.losses
    for size in (1, 3):
        assert_same(whole, learn(size, **options))


def test_a_mean_of_means_would_be_another_loss() -> None:
    """What the tests above tell apart: the rows' own means differ by far more than their tolerance."""
    lm = opinionated(tiny_language_model("gpt2"))
    rows = EncodedRows(lm, ROWS, max_length=64)
    means = []
    for part in micro_batches(BATCHES[0], 3):
        batch = rows.batch(part)
        tokens = response_tokens(batch)
        hidden_BTD = hidden_states(lm, batch.input_ids_BT)
        head = Head(lm.base.get_output_embeddings().weight, lm.table.num_tokens)
        means.append(float(cross_entropy(hidden_BTD[tokens.sample_N, tokens.position_N], head, tokens.target_N)[0]))
    whole = learn(None, matching="ce_only")
    assert abs(sum(means) / len(means) - whole.losses["a_ce"]) > 0.05


@pytest.mark.parametrize("micro_batch_size", [7, 100])
def test_one_micro_batch_is_the_whole_batch_to_the_bit(micro_batch_size: int) -> None:
    whole = learn(None, dtype=torch.float32, teacher=received(seed=1))
    one = learn(micro_batch_size, dtype=torch.float32, teacher=received(seed=1))
    assert one.losses == whole.losses
    assert all(torch.equal(x, y) for x, y in zip(one.adapters, whole.adapters, strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_float32_gradient_checkpointing_and_bfloat16_go_along(checkpointing: bool) -> None:
    options: dict[str, Any] = {"dtype": torch.float32, "gradient_checkpointing": checkpointing}
    plain = learn(None, **options)
    small = learn(2, **options)
    for name, value in plain.losses.items():
        assert small.losses[name] == pytest.approx(value, rel=1e-4)
    low = learn(2, precision="bfloat16", **options)
    for name, value in learn(None, precision="bfloat16", **options).losses.items():
        assert low.losses[name] == pytest.approx(value, rel=0.05)
        assert low.losses[name] != small.losses[name]


def tune(micro_batch_size: int | None, dtype: torch.dtype) -> tuple[dict[str, float], list[Tensor]]:
    lm = opinionated(tiny_language_model("qwen2"))
    with adapted(lm, lora_config(lm, rank=2, alpha=4.0), {"slm": 1}) as lent:
        lent.model.to(dtype)
        activate(lent, ["slm"], trainable=["slm"])
        losses = tune_adapter(
            lent,
            "slm",
            EncodedRows(lent, ROWS, max_length=64),
            BATCHES,
            learning_rate=1e-2,
            micro_batch_size=micro_batch_size,
            seed=0,
            stage="test",
            on_progress=lambda *_: None,
        )
        return losses, [each.detach().clone() for each in adapter_parameters(lent, "slm").values()]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-3)])
def test_tuning_by_cross_entropy_in_micro_batches(dtype: torch.dtype, tolerance: float) -> None:
    losses, state = tune(None, dtype)
    for size in (1, 3):
        other_losses, other_state = tune(size, dtype)
        assert other_losses["cross_entropy"] == pytest.approx(losses["cross_entropy"], rel=tolerance)
        for mine, theirs in zip(state, other_state, strict=True):
            torch.testing.assert_close(theirs, mine, rtol=tolerance, atol=tolerance * float(mine.abs().max()))


def test_the_loop_adds_up_what_micro_batches_give_and_holds_one_at_a_time() -> None:
    weight = torch.ones(2, requires_grad=True)
    asked: list[str] = []

    def step_at(step: int) -> Any:
        for part, factor in enumerate((2.0, 3.0)):
            asked.append(f"{step}.{part}: {None if weight.grad is None else weight.grad.tolist()}")
            yield Step({"one": factor * weight.sum()}, {"part": torch.tensor(factor)})

    seen: list[Mapping[str, float]] = []
    report: Callable[..., None] = lambda *values: seen.append(values[3])  # noqa: E731
    learner = Learner([weight], 0.1, gradient_clip=100.0)
    losses = train({"one": learner}, step_at, steps=2, stage="test", on_progress=report)
    assert asked == ["0.0: None", "0.1: [2.0, 2.0]", "1.0: None", "1.1: [2.0, 2.0]"]
    assert weight.grad is not None
    assert weight.grad.tolist() == [5.0, 5.0]
    assert seen == [{"part": 5.0}] * 2
    assert losses == {"part": 5.0}


def test_less_memory_is_needed() -> None:
    lm = larger("llama")
    batch = list(range(4))
    with adapted(lm, lora_config(lm, rank=4, alpha=4.0), {"slm": 1}) as lent:
        activate(lent, ["slm"], trainable=["slm"])
        encoded = EncodedRows(lent, long_rows(lm), max_length=160)

        def step(micro_batch_size: int | None) -> None:
            tune_adapter(
                lent,
                "slm",
                encoded,
                [batch],
                learning_rate=1e-3,
                micro_batch_size=micro_batch_size,
                seed=0,
                stage="test",
                on_progress=lambda *_: None,
            )

        step(None)
        whole, small = (peak_bytes(lambda size=size: step(size)) for size in (None, 1))
    assert small < 0.4 * whole
