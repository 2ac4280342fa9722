import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cotuning.examples import Example, render_prompt
from cotuning.pretraining import make_model, pretrain
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
