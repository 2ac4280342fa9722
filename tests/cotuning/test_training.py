import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cotuning.adapters import AdapterState, activate, adapted, adapter_state, fresh_adapter, lora_config
from cotuning.encoded_rows import EncodedRows
from cotuning.encoding import encode_batch
from cotuning.evaluation import bits_per_byte
from cotuning.examples import render_prompt
from cotuning.language_model import LanguageModel
from cotuning.training import Learner, Step, TrainingDiverged, draw_batches, row_sizes, train
from cotuning.tuning import tune_adapter
from tests.tiny_models import NAMES, tiny_examples, tiny_language_model

ROWS = tiny_examples(16)


def silent(stage: str, step: int, steps: int, losses: dict[str, float]) -> None:
    pass


def tune(lm: LanguageModel, *, seed: int = 0, steps: int = 12, **changes: Any) -> tuple[AdapterState, dict[str, float]]:
    dropout = changes.pop("dropout", 0.0)
    config = lora_config(lm, rank=2, alpha=4.0, dropout=dropout)
    options: dict[str, Any] = {"learning_rate": 1e-2, "seed": seed, "stage": "test", "on_progress": silent}
    with adapted(lm, config, {"slm": 5}) as lent:
        activate(lent, ["slm"], trainable=["slm"])
        batches = draw_batches(row_sizes(ROWS), batch_size=4, steps=steps, seed=seed)
        losses = tune_adapter(lent, "slm", EncodedRows(lent, ROWS, max_length=64), batches, **options | changes)
        return adapter_state(lent, "slm"), losses


@pytest.mark.parametrize("name", NAMES)
def test_tuning_lowers_the_loss_and_moves_nothing_but_the_adapter(name: str) -> None:
    lm = tiny_language_model(name)
    base = {key: tensor.clone() for key, tensor in lm.model.state_dict().items()}
    before = bits_per_byte(lm, ROWS)
    state, losses = tune(lm, steps=30, learning_rate=2e-2)
    with adapted(lm, lora_config(lm, rank=2, alpha=4.0), {"slm": state}) as lent:
        assert bits_per_byte(lent, ROWS) < 0.99 * before  # a random head is frozen: there is little to win
    assert set(losses) == {"cross_entropy"}
    assert all(torch.equal(tensor, base[key]) for key, tensor in lm.model.state_dict().items())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_equal_arguments_give_equal_bits_and_leave_the_global_generator_alone(dropout: float) -> None:
    lm = tiny_language_model("gpt2")
    generator = torch.get_rng_state()
    first, first_losses = tune(lm, seed=3, dropout=dropout)
    assert torch.equal(torch.get_rng_state(), generator)
    torch.rand(7)
    again, again_losses = tune(tiny_language_model("gpt2"), seed=3, dropout=dropout)
    other, _ = tune(lm, seed=4, dropout=dropout)
    assert first_losses == again_losses
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_only_the_adapters_own_dropout_acts() -> None:
    """GPT-2's config has a dropout of 0.1 in its base; with none in the adapter, seeds of dropout do not matter."""
    lm = tiny_language_model("gpt2")
    assert lm.model.config.resid_pdrop > 0
    rows = EncodedRows(lm, ROWS, max_length=64)
    results = []
    for seed, dropout in ((1, 0.0), (2, 0.0), (1, 0.5), (2, 0.5)):
        with adapted(lm, lora_config(lm, rank=2, alpha=4.0, dropout=dropout), {"slm": 5}) as lent:
            activate(lent, ["slm"], trainable=["slm"])
            tune_adapter(
                lent, "slm", rows, [[0, 1, 2]] * 3, learning_rate=1e-2, seed=seed, stage="test", on_progress=silent
            )
            results.append(torch.cat([tensor.flatten() for tensor in adapter_state(lent, "slm").values()]))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[2], results[3])


def test_the_first_step_by_an_independent_formula() -> None:
    """One AdamW step from nothing moves each weight by the learning rate against its gradient's sign."""
    lm = tiny_language_model("llama")
    config = lora_config(lm, rank=2, alpha=4.0)
    before = fresh_adapter(lm, config, seed=5)
    row = ROWS[3]
    text = render_prompt(lm.tokenizer, row)
    batch = encode_batch(lm.tokenizer, lm.table, [text], [row.output], max_length=64)
    with adapted(lm, config, {"slm": 5}) as lent:
        activate(lent, ["slm"], trainable=["slm"])
        lent.model(input_ids=batch.input_ids_BT, labels=batch.labels_BT).loss.backward()
        gradients = {
            name.replace(".slm.", "."): tensor.grad
            for name, tensor in lent.model.named_parameters()
            if ".lora_" in name
        }
    with adapted(lm, config, {"slm": 5}) as lent:
        activate(lent, ["slm"], trainable=["slm"])
        rows = EncodedRows(lent, ROWS, max_length=64)
        tune_adapter(lent, "slm", rows, [[3]], learning_rate=1e-3, seed=0, stage="test", on_progress=silent)
        after = adapter_state(lent, "slm")
    for name, gradient in gradients.items():
        assert gradient is not None
        moved = after[name] - before[name]
        large = gradient.abs() > 1e-5  # below, epsilon matters
        torch.testing.assert_close(moved[large], -1e-3 * gradient.sign()[large], rtol=1e-2, atol=0)


def test_progress_is_reported_after_each_step_and_what_it_raises_ends_the_training() -> None:
    calls: list[tuple[str, int, int]] = []

    class Cancelled(Exception):
        pass

    def until_third(stage: str, step: int, steps: int, losses: dict[str, float]) -> None:
        calls.append((stage, step, steps))
        assert set(losses) == {"cross_entropy"}
        if step == 3:
            raise Cancelled

    lm = tiny_language_model("llama")
    generator = torch.get_rng_state()
    with pytest.raises(Cancelled):
        tune(lm, on_progress=until_third)
    assert calls == [("test", 1, 12), ("test", 2, 12), ("test", 3, 12)]
    assert not hasattr(lm.model, "peft_config")
    assert torch.equal(torch.get_rng_state(), generator)


def test_bfloat16_autocast_trains_float32_adapters() -> None:
    lm = tiny_language_model("llama")
    exact, _ = tune(lm, steps=3)
    rough, losses = tune(lm, steps=3, precision="bfloat16")
    assert all(tensor.dtype == torch.float32 and bool(tensor.isfinite().all()) for tensor in rough.values())
    assert any(not torch.equal(exact[key], rough[key]) for key in exact)
    assert losses["cross_entropy"] == pytest.approx(tune(lm, steps=3)[1]["cross_entropy"], rel=0.02)


def test_warm_up_clip_and_report_of_the_loop() -> None:
    weight = torch.zeros(1, requires_grad=True)
    path: list[float] = []

    def step_at(step: int) -> list[Step]:
        path.append(float(weight.detach()))
        objective = -1000.0 * weight.sum()  # a constant gradient, so AdamW moves by the rate each step
        return [Step({"one": objective}, {"value": torch.tensor(float(step))})]

    report = train({"one": Learner([weight], 0.1)}, step_at, steps=40, stage="test", on_progress=silent)
    moves = [after - before for before, after in itertools.pairwise(path)]
    assert moves[:4] == pytest.approx([0.025, 0.05, 0.075, 0.1], rel=1e-4)
    assert moves[4:] == pytest.approx([0.1] * 35, rel=1e-3)
    assert report == {"value": pytest.approx((36 + 37 + 38 + 39) / 4)}


def test_decay_falls_to_nothing_in_a_straight_line() -> None:
    """With a gradient that stays the same, an AdamW step is as long as the rate."""
    moved = {}
    for schedule in ("constant", "linear"):
        weight = torch.zeros(1, requires_grad=True)
        places = [0.0]

        def step_at(_: int, weight: torch.Tensor = weight) -> list[Step]:
            return [Step({"one": weight.sum()}, {})]

        def note(*_: Any, weight: torch.Tensor = weight, places: list[float] = places) -> None:
            places.append(weight.item())

        train({"one": Learner([weight], 1.0)}, step_at, steps=10, stage="test", on_progress=note, schedule=schedule)
        moved[schedule] = [before - after for before, after in itertools.pairwise(places)]
    assert moved["constant"] == pytest.approx([1.0] * 10, rel=1e-4)
    assert moved["linear"] == pytest.approx([1.0 - step / 10 for step in range(10)], rel=1e-4)


def test_a_loss_that_is_not_finite_stops_the_training_with_finite_weights() -> None:
    weight = torch.ones(2, requires_grad=True)

    def step_at(step: int) -> list[Step]:
        objective = (weight * (torch.nan if step == 2 else 1.0)).sum()
        return [Step({"one": objective}, {})]

    with pytest.raises(TrainingDiverged, match=r"test, step 3 of 5: expected a finite loss and gradient for one"):
        train({"one": Learner([weight], 0.1)}, step_at, steps=5, stage="test", on_progress=silent)
    assert bool(weight.isfinite().all())


@given(st.lists(st.integers(0, 50), min_size=1, max_size=40), st.integers(1, 9), st.integers(1, 30), st.integers(0, 99))
def test_batches_draw_every_row_before_any_again(sizes: list[int], batch_size: int, steps: int, seed: int) -> None:
    batches = draw_batches(sizes, batch_size=batch_size, steps=steps, seed=seed)
    assert [len(batch) for batch in batches] == [batch_size] * steps
    assert batches == draw_batches(sizes, batch_size=batch_size, steps=steps, seed=seed)
    counts = Counter(index for batch in batches for index in batch)
    drawn = [counts[index] for index in range(len(sizes))]
    assert set(counts) <= set(range(len(sizes)))
    assert max(drawn) - min(drawn) <= 1


def test_rows_of_like_size_come_together() -> None:
    sizes = list(range(256))
    batches = draw_batches(sizes, batch_size=8, steps=32, seed=0)
    spread = sum(max(batch) - min(batch) for batch in batches) / len(batches)
    assert spread < 40  # shuffled rows alone would spread over about 200
    assert batches != draw_batches(sizes, batch_size=8, steps=32, seed=1)


def test_no_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="expected at least one row"):
        draw_batches([], batch_size=4, steps=1, seed=0)


def test_encoded_rows_equal_encoding_the_batch() -> None:
    lm = tiny_language_model("bloom")
    rows = EncodedRows(lm, ROWS, max_length=48)
    chosen = [5, 0, 9, 5]
    batch = rows.batch(chosen)
    prompts = [render_prompt(lm.tokenizer, ROWS[index]) for index in chosen]
    expected = encode_batch(lm.tokenizer, lm.table, prompts, [ROWS[index].output for index in chosen], max_length=48)
    for name in expected.__dataclass_fields__:
        assert torch.equal(getattr(batch, name), getattr(expected, name)), name
