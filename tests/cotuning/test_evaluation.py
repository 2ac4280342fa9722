import math
from functools import lru_cache

import pytest
import torch

from cotuning.adapters import activate, adapted, lora_config
from cotuning.encoded_rows import EncodedRows
from cotuning.evaluation import Scores, bits_per_byte, evaluate, measure_rows
from cotuning.examples import Example, render_prompt
from cotuning.generation import generate, sample
from cotuning.language_model import LanguageModel
from cotuning.training import draw_batches, row_sizes
from cotuning.tuning import tune_adapter
from tests.tiny_models import NAMES, tiny_examples, tiny_language_model


def varied_rows() -> list[Example]:
    """Prompts of very different lengths, so that left padding is put to the test."""
    fillers = ["", "Then", "Look at the river and the house and the cloud. " * 3, "12345", "quick brown fox " * 5]
    return [
        Example(str(number), f"{filler}{number}", filler[:9], "blue stone") for number, filler in enumerate(fillers * 2)
    ]


def one_by_one(lm: LanguageModel, row: Example, max_new_tokens: int) -> str:
    """The plain definition: no batch, no padding, no cache, all logits, until the end token."""
    ids = lm.tokenizer(render_prompt(lm.tokenizer, row), add_special_tokens=False)["input_ids"]
    new_ids: list[int] = []
    for _ in range(max_new_tokens):
        with torch.no_grad():
            logits_V = lm.model(input_ids=torch.tensor([ids + new_ids])).logits[0, -1, : lm.table.num_tokens]
        token = int(logits_V.argmax())
        if token == lm.table.end_id:
            break
        new_ids.append(token)
    return str(lm.tokenizer.decode(new_ids, skip_special_tokens=True))


def sharpened(name: str) -> LanguageModel:
    """Random models repeat one token for ever; larger weights make their answers depend on the prompt."""
    lm = tiny_language_model(name, seed=3)
    generator = torch.Generator().manual_seed(0)
    for tensor in lm.model.parameters():
        if tensor.dim() > 1:
            tensor.normal_(std=0.6, generator=generator)
    return lm


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch_size", [3, 32])
def test_batched_answers_equal_answers_one_by_one(name: str, batch_size: int) -> None:
    lm = sharpened(name)
    rows = varied_rows()
    answers = generate(lm, rows, max_new_tokens=10, batch_size=batch_size, max_length=512)
    expected = [one_by_one(lm, row, 10) for row in rows]
    assert answers == expected
    assert len(set(expected)) > 3


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_equals_transformers_generate(name: str) -> None:
    lm = sharpened(name)
    row = varied_rows()[2]
    ids = lm.tokenizer(render_prompt(lm.tokenizer, row), add_special_tokens=False, return_tensors="pt")
    output = lm.model.generate(
        input_ids=ids["input_ids"], attention_mask=ids["attention_mask"], max_new_tokens=12, do_sample=False
    )
    new = output[0, ids["input_ids"].shape[1] :]
    expected = lm.tokenizer.decode(new, skip_special_tokens=True)
    assert generate(lm, [row], max_new_tokens=12, max_length=512) == [expected]


def test_rows_stop_at_their_end_token_each_for_itself() -> None:
    lm = tuned()
    rows = tiny_examples(8)
    answers = generate(lm, rows, max_new_tokens=30, batch_size=8)
    assert answers == [row.output for row in rows]
    cut = generate(lm, rows, max_new_tokens=2, batch_size=8)
    assert all(whole.startswith(part) and part != whole for part, whole in zip(cut, answers, strict=True))


@lru_cache(maxsize=1)
def tuned() -> LanguageModel:
    """A model that has learned eight rows by heart."""
    lm = tiny_language_model("llama")
    lm.model.requires_grad_(True)
    rows = EncodedRows(lm, tiny_examples(8), max_length=128)
    batch = rows.batch(range(8))
    optimizer = torch.optim.AdamW(lm.model.parameters(), lr=2e-2)
    for _ in range(150):
        lm.model(input_ids=batch.input_ids_BT, labels=batch.labels_BT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    lm.model.requires_grad_(False)
    return lm


def test_a_model_that_knows_the_answers_scores_100() -> None:
    scores = evaluate(tuned(), tiny_examples(8), max_new_tokens=30, batch_size=3)
    assert scores.exact_match == 100.0
    assert scores.rouge_l == pytest.approx(100.0)
    assert scores.bits_per_byte < 0.2
    assert scores.num_rows == 8


@pytest.mark.parametrize("batch_size", [3, 16])
def test_each_rows_part_is_that_of_the_row_alone(batch_size: int) -> None:
    lm = sharpened("bloom")
    rows = [*varied_rows(), *tiny_examples(3)]
    measured = measure_rows(lm, rows, max_new_tokens=5, batch_size=batch_size)
    for place, row in enumerate(rows):
        alone = evaluate(lm, [row], max_new_tokens=5)
        assert measured.rouge_l[place] == alone.rouge_l
        assert measured.exact_match[place] == (alone.exact_match == 100.0)
        assert measured.num_bytes[place] == len(row.output.encode())
        assert measured.bits[place] / measured.num_bytes[place] == pytest.approx(alone.bits_per_byte, rel=1e-4)
    assert measured.scores == evaluate(lm, rows, max_new_tokens=5, batch_size=batch_size)


def test_several_references_count() -> None:
    lm = tuned()
    rows = [
        Example(row.id, row.instruction, row.input, row.output, references=("nothing like it", row.output.upper()))
        for row in tiny_examples(8)
    ]
    assert evaluate(lm, rows, max_new_tokens=30).exact_match == 100.0
    others = [Example(row.id, row.instruction, row.input, row.output, references=("other",)) for row in rows]
    assert evaluate(lm, others, max_new_tokens=30).exact_match == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_bits_per_byte_by_its_definition(name: str) -> None:
    lm = tiny_language_model(name)
    rows = [*tiny_examples(3), Example("é", "Say it.", "", "naïve café 12")]
    nats = num_bytes = 0.0
    for row in rows:
        prompt = render_prompt(lm.tokenizer, row)
        prompt_ids = lm.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        ids = [*lm.tokenizer(prompt + row.output, add_special_tokens=False)["input_ids"], lm.table.end_id]
        assert ids[: len(prompt_ids)] == prompt_ids
        with torch.no_grad():
            logs_TV = lm.model(input_ids=torch.tensor([ids])).logits[0, :, : lm.table.num_tokens].log_softmax(-1)
        nats -= sum(float(logs_TV[place - 1, ids[place]]) for place in range(len(prompt_ids), len(ids)))
        num_bytes += len(row.output.encode())
    assert bits_per_byte(lm, rows, batch_size=2) == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)


def test_adapters_take_part() -> None:
    lm = tiny_language_model("llama")
    config = lora_config(lm, rank=4, alpha=8.0)
    rows = EncodedRows(lm, tiny_examples(8), max_length=128)
    before = bits_per_byte(lm, rows.examples)
    with adapted(lm, config, {"slm": 0}) as lent:
        activate(lent, ["slm"], trainable=["slm"])
        batches = draw_batches(row_sizes(rows.examples), batch_size=8, steps=30, seed=0)
        tune_adapter(lent, "slm", rows, batches, learning_rate=2e-2, seed=0, stage="test", on_progress=lambda *_: None)
        assert bits_per_byte(lent, rows.examples) < before
        assert isinstance(evaluate(lent, rows.examples, max_new_tokens=4), Scores)
    assert bits_per_byte(lm, rows.examples) == before


def test_over_long_rows_lose_their_head_and_an_answer_is_given() -> None:
    lm = tiny_language_model("gpt2")
    row = Example("long", "word " * 500, "", "x")
    assert len(generate(lm, [row], max_new_tokens=3, max_length=32)) == 1
    assert math.isfinite(bits_per_byte(lm, [row], max_length=32))


def test_progress_is_told_between_any_two_tokens_and_counts_every_row_twice() -> None:
    lm = sharpened("gpt2")
    rows = varied_rows()
    seen: list[tuple[int, int]] = []
    scores = evaluate(lm, rows, max_new_tokens=5, batch_size=4, on_rows=lambda done, total: seen.append((done, total)))
    assert scores == evaluate(lm, rows, max_new_tokens=5, batch_size=4)
    done = [each for each, _ in seen]
    assert {total for _, total in seen} == {2 * len(rows)}
    assert done == sorted(done)
    assert done[-1] == 2 * len(rows)
    longest = max(len(lm.tokenizer(answer)["input_ids"]) for answer in generate(lm, rows, max_new_tokens=5))
    assert len([each for each in done if each <= len(rows)]) > longest  # not once a batch of rows
    assert {len(rows), len(rows) + 4, len(rows) + 8} <= set(done)


@pytest.mark.parametrize("call", [1, 3, 9])
def test_what_progress_raises_ends_the_evaluation_with_the_model_as_it_was(call: int) -> None:
    class Stopped(Exception):
        pass

    def stop(*_: int) -> None:
        calls.append(None)
        if len(calls) == call:
            raise Stopped

    calls: list[None] = []
    lm = sharpened("gpt2")
    lm.model.train()
    with pytest.raises(Stopped):
        evaluate(lm, varied_rows(), max_new_tokens=5, batch_size=4, on_rows=stop)
    assert len(calls) == call
    assert lm.model.training


def test_no_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="expected at least one row"):
        evaluate(tiny_language_model("gpt2"), [], max_new_tokens=3)


def test_sampled_answers_follow_from_the_seed_and_leave_the_global_generator_alone() -> None:
    lm, rows = tiny_language_model("llama"), tiny_examples(6)
    generator = torch.get_rng_state()
    first = sample(lm, rows, max_new_tokens=8, seed=1)
    assert torch.equal(torch.get_rng_state(), generator)
    assert first == sample(lm, rows, max_new_tokens=8, seed=1)
    assert first != sample(lm, rows, max_new_tokens=8, seed=2)
    cold = sample(lm, rows, max_new_tokens=8, temperature=1e-6, seed=1)
    assert cold == generate(lm, rows, max_new_tokens=8)
    with pytest.raises(ValueError, match="expected a temperature above 0, got 0"):
        sample(lm, rows, max_new_tokens=8, temperature=0, seed=1)


def test_samples_have_the_models_own_frequencies() -> None:
    lm = tiny_language_model("llama")
    for tensor in lm.model.parameters():
        if tensor.dim() > 1:
            tensor.mul_(12)
    row = tiny_examples(1)[0]
    prompt = render_prompt(lm.tokenizer, row)
    ids = torch.tensor([lm.tokenizer(prompt)["input_ids"]])
    with torch.no_grad():
        probs_V = (lm.model(input_ids=ids).logits[0, -1] / 0.3).softmax(-1)
    best = int(probs_V.argmax())
    answers = sample(lm, [row] * 600, max_new_tokens=1, temperature=0.3, seed=5)
    share = sum(answer == lm.tokenizer.decode([best]) for answer in answers) / 600
    expected = float(probs_V[best])
    assert 0.05 < expected < 0.95
    assert abs(share - expected) < 4 * (expected * (1 - expected) / 600) ** 0.5
