import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cotuning.checkpoints import TrainingState
from cotuning.examples import Example, render_prompt
from cotuning.pretraining import make_model, pretrain, text_bits_per_byte
from cotuning.pretraining_text import TrainingText
from cotuning.tokenizer_training import train_tokenizer

KINDS = ("bpe_single_digits", "bpe_digit_groups", "bpe_whole_numbers", "unigram")
ARCHITECTURES = ("llama", "gpt2", "qwen3", "bloom")

ROWS = [
    TrainingText(render_prompt(None, Example(str(number), instruction, str(number), answer)), answer)
    for number in range(100, 160)
    for instruction, answer in (("Is it even?", "no" if number % 2 else "yes"), ("Say the word.", "word"))
]
DOCUMENTS = [
    TrainingText("", f"The number {number} comes before the number {number + 1}. " * 3) for number in range(20)
]
TEXTS = [each.prompt + each.text for each in (*ROWS, *DOCUMENTS)]


def tokenizer_of(kind, vocab_size=400):
    return train_tokenizer(kind, TEXTS, vocab_size=vocab_size, max_length=64)


def small_model(architecture, tokenizer, seed=0):
    return make_model(architecture, tokenizer, hidden_size=16, layers=1, heads=2, max_length=64, seed=seed)


def train(model, tokenizer, *, steps=20, seed=0, on_progress=lambda *_: None, **changed):
    settings = {
        "document_share": 0.2,
        "batch_size": 8,
        "max_length": 64,
        "learning_rate": 1e-2,
        "prompt_weight": 0.1,
        "precision": "float32",
    }
    return pretrain(
        model, tokenizer, ROWS, DOCUMENTS, steps=steps, seed=seed, on_progress=on_progress, **settings | changed
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_gives_back_every_text_even_of_characters_it_never_saw(kind):
    tokenizer = tokenizer_of(kind)
    for text in (*TEXTS[:20], "Grüße, 日本語 🙂\n\tend", "a  b   c", "x\n\ny\n"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("kind", KINDS)
def test_a_response_starts_on_a_token_boundary_and_nothing_is_added(kind):
    tokenizer = tokenizer_of(kind)
    for row in ROWS[:20]:
        together = tokenizer(row.prompt + row.text)["input_ids"]
        assert together == tokenizer(row.prompt)["input_ids"] + tokenizer(row.text)["input_ids"]
        assert not set(together) & set(tokenizer.all_special_ids)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_has_distinct_end_and_padding_and_the_size_asked_for(kind):
    tokenizer = tokenizer_of(kind)
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    assert 300 < len(tokenizer) <= 400
    assert tokenizer.model_max_length == 64
    assert len(tokenizer_of(kind, vocab_size=300)) <= 300


def test_the_kinds_cut_numbers_differently():
    tokens = {kind: tokenizer_of(kind, vocab_size=2000).tokenize("142") for kind in KINDS}
    assert tokens["bpe_single_digits"] == ["1", "4", "2"]
    assert tokens["bpe_digit_groups"] == ["142"]


def test_unigram_normalises_to_nfkc_and_keeps_frequent_words_whole():
    tokenizer = tokenizer_of("unigram")
    assert tokenizer.decode(tokenizer("ﬁve ²")["input_ids"]) == "five 2"
    assert "Instruction:" in tokenizer.tokenize(TEXTS[0])
    assert "\n" in tokenizer.tokenize("a\nb")


def test_unigram_leaves_the_rare_ones_of_very_many_characters_to_their_bytes():
    texts = [*TEXTS, "".join(chr(number) for number in range(0x4E00, 0x5200))]
    tokenizer = train_tokenizer("unigram", texts, vocab_size=400, max_length=64)
    assert len(tokenizer) <= 400
    assert tokenizer.decode(tokenizer(texts[-1])["input_ids"]) == texts[-1]


@pytest.mark.parametrize(("architecture", "kind"), list(zip(ARCHITECTURES, KINDS, strict=True)))
def test_a_saved_model_loads_as_any_other(architecture, kind, tmp_path):
    tokenizer = tokenizer_of(kind)
    model = small_model(architecture, tokenizer).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, loaded_tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.config.model_type == architecture
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id
    assert loaded.generation_config.pad_token_id == tokenizer.pad_token_id
    batch = loaded_tokenizer(TEXTS[:3], return_tensors="pt", padding=True)
    assert torch.equal(batch["input_ids"], tokenizer(TEXTS[:3], return_tensors="pt", padding=True)["input_ids"])
    with torch.no_grad():
        logits = [
            each(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            for each in (model, loaded)
        ]
    assert torch.equal(*logits)


@pytest.mark.parametrize(("architecture", "kind"), list(zip(ARCHITECTURES, KINDS, strict=True)))
def test_pretraining_lowers_the_loss_and_reports_every_step(architecture, kind):
    tokenizer = tokenizer_of(kind)
    steps: list[tuple[int, int, float]] = []
    done = train(small_model(architecture, tokenizer), tokenizer, on_progress=lambda *each: steps.append(each))
    last = done.loss
    assert [step for step, _, _ in steps] == list(range(1, 21))
    assert {of for _, of, _ in steps} == {20}
    assert last < 0.7 * steps[0][2]
    assert last == pytest.approx(sum(loss for _, _, loss in steps[-2:]) / 2)


def test_equal_seeds_give_equal_models_and_others_do_not():
    tokenizer = tokenizer_of("bpe_single_digits")

    def trained(seed, order):
        model = small_model("llama", tokenizer, seed)
        train(model, tokenizer, steps=4, seed=order)
        return model.state_dict()

    def equal(first, second):
        return all(torch.equal(first[name], second[name]) for name in first)

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = trained(0, 0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert equal(first, trained(0, 0))
    assert not equal(first, trained(1, 0))
    assert not equal(first, trained(0, 1))


def test_what_the_callers_progress_raises_stops_the_training():
    class Stopped(Exception):
        pass

    def stop(step, *_):
        if step == 3:
            raise Stopped

    tokenizer = tokenizer_of("bpe_single_digits")
    with pytest.raises(Stopped):
        train(small_model("llama", tokenizer), tokenizer, on_progress=stop)


def test_a_prompt_without_weight_is_not_learned():
    """With one answer to every prompt, the loss of the answers alone falls to nothing; that of the prompts cannot."""
    tokenizer = tokenizer_of("bpe_single_digits")
    rows = [row for row in ROWS if row.text == "word"]
    losses = {}
    for weight in (0.0, 1.0):
        model = small_model("llama", tokenizer)
        settings = {"document_share": 0.0, "steps": 30, "batch_size": 8, "max_length": 64, "learning_rate": 1e-2}
        losses[weight] = pretrain(
            model,
            tokenizer,
            rows,
            [],
            prompt_weight=weight,
            precision="float32",
            seed=0,
            on_progress=lambda *_: None,
            **settings,
        ).loss
    assert losses[0.0] < 0.5 * losses[1.0]


def test_bfloat16_trains_like_float32():
    tokenizer = tokenizer_of("bpe_single_digits")
    losses = [
        train(small_model("llama", tokenizer), tokenizer, steps=10, precision=precision).loss
        for precision in ("float32", "bfloat16")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_long_documents_are_cut_and_long_rows_lose_their_end():
    tokenizer = tokenizer_of("bpe_single_digits")
    lengths: list[int] = []
    model = small_model("llama", tokenizer)
    model.register_forward_pre_hook(
        lambda _, __, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    train(model, tokenizer, steps=6, max_length=16, document_share=0.5)
    assert max(lengths) == 16


def test_packed_windows_are_of_one_length_and_lower_the_loss():
    tokenizer = tokenizer_of("bpe_single_digits")
    model = small_model("llama", tokenizer)
    shapes: set[tuple[int, ...]] = set()
    model.register_forward_pre_hook(
        lambda _, __, kwargs: shapes.add(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    losses: list[float] = []
    done = train(
        model, tokenizer, packed=True, max_length=64, batch_size=4, on_progress=lambda _, __, loss: losses.append(loss)
    )
    assert {length for _, length in shapes} == {64}
    assert done.loss < 0.8 * losses[0]
    assert 0.6 * 20 * 4 * 64 < done.num_tokens <= 20 * 4 * 64


def test_gradient_accumulation_changes_nothing_but_rounding():
    tokenizer = tokenizer_of("bpe_single_digits")
    losses = [
        train(small_model("llama", tokenizer), tokenizer, packed=True, steps=6, micro_batch_size=size).loss
        for size in (None, 3)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


class Kept:
    """Checkpoints in memory, as a real folder would keep them: copies, every second step."""

    def __init__(self):
        self.states = {}

    def due(self, step, steps):
        return step % 2 == 0 or step == steps

    def read(self, stage, fingerprint):
        return self.states.get((stage, fingerprint))

    def write(self, stage, fingerprint, state):
        tensors = {name: tensor.clone() for name, tensor in state.tensors.items()}
        reported = {name: list(values) for name, values in state.reported.items()}
        self.states[stage, fingerprint] = TrainingState(state.step, tensors, reported)


@pytest.mark.parametrize("packed", [False, True])
def test_an_interrupted_training_goes_on_to_the_same_bits_and_measures_the_same(packed):
    class Stopped(Exception):
        pass

    def stop(step, *_):
        if step == 5:
            raise Stopped

    tokenizer = tokenizer_of("bpe_single_digits")
    settings = {"steps": 9, "packed": packed, "max_length": 32, "measure_every": 2, "schedule": "wsd"}

    def run(checkpoints, **changed):
        model = small_model("llama", tokenizer)
        measured: dict[int, int] = {}
        done = train(model, tokenizer, checkpoints=checkpoints, on_measure=measured.__setitem__, **settings | changed)
        return model.state_dict(), done, measured

    whole, done, measured = run(None)
    assert list(measured) == [2, 4, 6, 8, 9]
    kept = Kept()
    with pytest.raises(Stopped):
        run(kept, on_progress=stop)
    resumed, done_again, rest = run(kept)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert done_again == done
    assert rest == {step: tokens for step, tokens in measured.items() if step >= 4}
    finished, done_once_more, last = run(kept)
    assert all(torch.equal(whole[name], finished[name]) for name in whole)
    assert done_once_more == done
    assert last == {9: measured[9]}


def test_nothing_to_read_is_refused():
    tokenizer = tokenizer_of("bpe_single_digits")
    with pytest.raises(ValueError, match="expected text to pretrain on"):
        pretrain(
            small_model("llama", tokenizer),
            tokenizer,
            [],
            [],
            document_share=0.5,
            steps=1,
            batch_size=1,
            max_length=8,
            learning_rate=1e-3,
            prompt_weight=1.0,
            precision="float32",
            seed=0,
            on_progress=lambda *_: None,
        )


@pytest.mark.parametrize("length", [8, 64])
def test_bits_a_byte_of_text_are_those_of_a_sum_written_out(length):
    """Token by token, each with the tokens of its window before it; windows overlap by the one that is only read."""
    tokenizer = tokenizer_of("bpe_single_digits")
    model = small_model("llama", tokenizer).eval()
    documents = ["The number 3 comes before the number 4.", "Grüße."]
    stream = [tokenizer.eos_token_id]
    for each in documents:
        stream += [*tokenizer(each)["input_ids"], tokenizer.eos_token_id]
    bits = 0.0
    with torch.no_grad():
        for place in range(1, len(stream)):
            start = (place - 1) // (length - 1) * (length - 1)
            logits = model(input_ids=torch.tensor([stream[start:place]])).logits[0, -1]
            bits -= float(torch.log_softmax(logits.double(), -1)[stream[place]]) / math.log(2)
    measured = text_bits_per_byte(model, tokenizer, documents, length=length, batch_size=2, precision="float32")
    assert measured == pytest.approx(bits / len("".join(documents).encode()), rel=1e-5)
