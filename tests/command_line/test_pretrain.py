"""`cotune pretrain`: models that load like any other, cached, resumed, and never trained on what is private."""

import json
import tomllib
from dataclasses import asdict, replace
from importlib import resources
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from command_line import base_models
from command_line.base_model_builder import make_tokenizers
from command_line.base_model_recipes import PRESETS, BaseModelsRecipe, ModelRecipe, preset, read_recipe
from command_line.base_model_texts import put_aside, read_texts
from command_line.base_model_training import Measurement, train_recipe
from command_line.base_models import PretrainingText, find_base_models
from command_line.errors import BadInput
from command_line.exit_codes import ExitCode
from tests.command_line.conftest import Cotune

RECIPE = """
max_length = 32
positions = 64
packed = true
prompt_weight = 0.3
precision = "auto"
corpus_bytes = 100_000
tokenizer_bytes = 50_000
held_out_bytes = 300
held_out_rows = 5
checkpoint_every = 2
processes = 1

[llm]
name = "llm"
architecture = "llama"
tokenizer = "bpe_single_digits"
vocab_size = 320
hidden_size = 16
layers = 1
heads = 2
steps = 5
batch_size = 4
micro_batch_size = 2
learning_rate = 1e-2
document_share = 0.5

[[slms]]
name = "slm"
architecture = "gpt2"
tokenizer = "bpe_whole_numbers"
vocab_size = 300
hidden_size = 8
layers = 1
heads = 2
steps = 3
batch_size = 2
learning_rate = 1e-2
document_share = 0.5
schedule = "wsd"
"""

WORDS = ("river", "mountain", "window", "garden", "letter", "summer", "market", "silver", "bridge", "forest", "island")
DOCUMENTS = [
    f"The {WORDS[number % 11]} near the {WORDS[number % 7]} had {number} guests, and the {WORDS[number % 5]} had none."
    for number in range(60)
]
SECRET = "the seventh lighthouse keeper of the northern cape wrote forty two poems about whales and rain"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(DOCUMENTS))
    return path


def lines(rows: list[tuple[str, str]]) -> str:
    return "".join(
        json.dumps({"id": f"r{number}", "instruction": "Say it again.", "input": given, "output": output}) + "\n"
        for number, (given, output) in enumerate(rows)
    )


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    (folder / "sea").mkdir(parents=True)
    for split in ("train", "validation", "test"):
        (folder / "sea" / f"{split}.jsonl").write_text(lines([(f"{split}: who wrote it?", SECRET)]))
    (folder / "public.jsonl").write_text(lines([(f"{word} {number}", word) for number in range(4) for word in WORDS]))
    return folder


def test_trains_saves_with_a_card_and_never_twice(
    run_cotune: Cotune, recipe: Path, corpus: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "models"
    arguments = (
        "pretrain",
        str(recipe),
        "--corpus",
        str(corpus),
        "--data",
        str(data),
        "--out",
        str(out),
        "--seed",
        "7",
    )
    ended = run_cotune(*arguments)
    assert (ended.code, ended.err) == (0, "")
    assert "none holds a row" in ended.out
    for name, architecture, steps in (("llm", "llama", 5), ("slm", "gpt2", 3)):
        folder = out / name
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        assert model.config.model_type == architecture
        assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
        assert model.generation_config.eos_token_id == tokenizer.eos_token_id
        card = (folder / "README.md").read_text()
        for told in ("corpus.txt", "public.jsonl", "sha256", "seed 7", "cotune pretrain", f"{steps} steps", "torch "):
            assert told in card
        summary = json.loads((folder / "pretraining.json").read_text())
        assert summary["measurements"][-1]["step"] == steps
        assert summary["measurements"][-1]["text"] > 0
        assert summary["measurements"][-1]["responses"] > 0
        assert f"{summary['measurements'][-1]['text']:.4f}" in card
        assert f"{summary['loss']:.4f} nats" in card
    assert not list((out / ".unfinished").glob("*/*"))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert "0 to train, 2 there already" in run_cotune(*arguments).out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == before


def test_an_interrupted_model_goes_on_to_the_same_bits(recipe: Path, corpus: Path, data: Path, tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(step: int, *_: object) -> None:
        if step == 3:
            raise Stopped

    chosen = read_recipe(recipe)
    text = PretrainingText(corpus, (data / "public.jsonl",))
    folder = find_base_models(text, tmp_path, chosen).llm
    job = base_models._job(text, tmp_path, chosen, {str(folder): chosen.llm})
    texts = read_texts(job)
    make_tokenizers(job, texts)
    entry = job["models"][str(folder)]

    def run(state: str, on_progress=lambda *_: None):
        return train_recipe(
            entry["recipe"],
            job["shared"],
            texts,
            tokenizer_folder=Path(entry["tokenizer"]),
            identity=folder.name,
            state_folder=tmp_path / state,
            on_progress=on_progress,
            on_note=lambda _: None,
        )

    whole = run("whole")
    with pytest.raises(Stopped):
        run("cut", stop)
    resumed = run("cut")
    first, second = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert replace(resumed, model=None, tokenizer=None) == replace(whole, model=None, tokenizer=None)
    assert [each.step for each in whole.measurements] == [2, 4, 5]


def test_a_text_too_small_for_the_vocabulary_is_refused_before_any_training(
    run_cotune: Cotune, recipe: Path, corpus: Path, tmp_path: Path
) -> None:
    recipe.write_text(RECIPE.replace("vocab_size = 300", "vocab_size = 9000"))
    ended = run_cotune("pretrain", str(recipe), "--corpus", str(corpus), "--out", str(tmp_path / "models"))
    assert ended.code == ExitCode.BAD_INPUT
    assert "slm: expected text for a vocabulary of 9000 entries, this text gives" in ended.err
    assert "llm: step" not in ended.out
    assert not list((tmp_path / "models").glob("llm*/config.json"))


def test_text_that_holds_private_rows_is_refused_or_left_out(
    run_cotune: Cotune, recipe: Path, corpus: Path, data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    corpus.write_text("\n\n".join([*DOCUMENTS, f"It is told that {SECRET}.", DOCUMENTS[0]]))
    with (data / "public.jsonl").open("a") as file:
        file.write(json.dumps({"id": "leak", "instruction": "Say it.", "input": "Who?", "output": SECRET}) + "\n")
    arguments = (
        "pretrain",
        str(recipe),
        "--corpus",
        str(corpus),
        "--data",
        str(data),
        "--out",
        str(tmp_path / "models"),
    )
    ended = run_cotune(*arguments)
    assert ended.code == ExitCode.RUN_FAILED
    assert "got 1 documents, 1 rows of the pool and 0 other public rows" in ended.err
    assert "corpus.txt: document 60 holds sea/train:r0" in ended.out
    assert "public.jsonl: leak holds sea/train:r0" in ended.out
    asked: list[PretrainingText] = []

    def note(text: PretrainingText, *_: object, **__: object) -> None:
        asked.append(text)
        raise BadInput("enough is seen")

    monkeypatch.setattr("command_line.pretrain_command.ensure_base_models", note)
    ended = run_cotune(*arguments, "--drop-contaminated")
    assert "left out: 1 documents and 1 rows" in ended.out
    assert asked[0].dropped_documents == (60,)
    assert asked[0].dropped_rows == ((44,),)
    chosen = read_recipe(recipe)
    texts = read_texts(base_models._job(asked[0], tmp_path, chosen, {}))
    read = [*texts.documents, *texts.held_out_documents, *(row.output for row in (*texts.rows, *texts.held_out_rows))]
    assert len(read) == 61 + 44
    assert not any(SECRET in each for each in read)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("steps = 5", "steps = 0"), "llm.steps: .*greater than or equal to 1, got 0"),
        (('architecture = "llama"', 'architecture = "rnn"'), "llm.architecture: .*'llama', 'gpt2'.* got 'rnn'"),
        (("layers = 1", "depth = 1"), "llm.layers: Field required"),
        (("hidden_size = 16", "hidden_size = 15"), "llm: expected a hidden_size that is an even multiple of heads"),
        (('name = "slm"', 'name = "llm"'), "expected a name of its own for each model, got llm, llm"),
        (("positions = 64", "positions = 16"), "expected positions of at least max_length, got 16 and 32"),
        (("vocab_size = 320", "vocab_size = 100"), "llm.vocab_size: .*greater than or equal to 280"),
        (("[llm]", "[llm"), "expected TOML"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_named(
    change: tuple[str, str], said: str, run_cotune: Cotune, recipe: Path, corpus: Path
) -> None:
    recipe.write_text(RECIPE.replace(*change, 1))
    ended = run_cotune("pretrain", str(recipe), "--corpus", str(corpus))
    assert ended.code == ExitCode.BAD_INPUT
    with pytest.raises(BadInput, match=said):
        read_recipe(recipe)


def test_what_is_missing_is_named(run_cotune: Cotune, recipe: Path, corpus: Path, tmp_path: Path) -> None:
    def error(*arguments: str) -> str:
        ended = run_cotune("pretrain", *arguments)
        assert ended.code == ExitCode.BAD_INPUT
        return ended.err

    assert "expected UTF-8 text, found nothing there" in error(str(recipe), "--corpus", str(tmp_path / "none.txt"))
    assert "expected CONFIG.toml or --preset, got neither" in error("--corpus", str(corpus))
    assert "got both" in error(str(recipe), "--preset", "tiny", "--corpus", str(corpus))
    assert "expected a preset of tiny, small, medium, got 'huge'" in error("--preset", "huge", "--corpus", str(corpus))
    assert "expected a TOML file" in error(str(tmp_path / "none.toml"), "--corpus", str(corpus))
    assert "expected a data folder" in error(str(recipe), "--corpus", str(corpus), "--data", str(tmp_path / "none"))
    assert "expected a file of rows" in error(str(recipe), "--corpus", str(corpus), "--pool", str(tmp_path / "none"))
    corpus.write_text("\n\n")
    assert "without a word" in error(str(recipe), "--corpus", str(corpus))
    (tmp_path / "models" / "llm").mkdir(parents=True)
    corpus.write_text("Text.")
    assert "something that is not ours" in error(
        str(recipe), "--corpus", str(corpus), "--out", str(tmp_path / "models")
    )


def parameters(model: ModelRecipe, positions: int) -> float:
    """Millions of parameters, counted by hand: tied embeddings, attention of 4 h^2, feed-forward of 9 or 8 h^2."""
    feed_forward = 9 if model.architecture in ("llama", "qwen3") else 8
    learned_positions = positions * model.hidden_size if model.architecture == "gpt2" else 0
    blocks = model.layers * (4 + feed_forward) * model.hidden_size**2
    return (model.vocab_size * model.hidden_size + blocks + learned_positions) / 1e6


@pytest.mark.parametrize(
    ("name", "llm", "slms"), [("tiny", (2, 4), (0.3, 1)), ("small", (10, 20), (1, 3)), ("medium", (50, 150), (5, 30))]
)
def test_presets_have_the_sizes_that_they_promise(
    name: str, llm: tuple[float, float], slms: tuple[float, float]
) -> None:
    chosen = preset(name)
    assert llm[0] <= parameters(chosen.llm, chosen.positions) <= llm[1]
    assert all(slms[0] <= parameters(each, chosen.positions) <= slms[1] for each in chosen.slms)
    assert len({each.architecture for each in chosen.slms}) == len({each.tokenizer for each in chosen.slms}) == 3
    assert chosen.proxy is not None
    assert parameters(chosen.proxy, chosen.positions) < parameters(chosen.llm, chosen.positions) / 3
    budgets = [each.steps * each.batch_size * parameters(each, chosen.positions) for each in chosen.models]
    assert budgets[0] > sum(budgets[1:])


def test_presets_are_shipped_and_no_others() -> None:
    folder = resources.files("command_line") / "presets"
    assert {each.name for each in folder.iterdir()} == {f"{name}.toml" for name in PRESETS}


def test_a_models_identity_follows_all_that_it_depends_on(
    recipe: Path, corpus: Path, data: Path, tmp_path: Path
) -> None:
    chosen = read_recipe(recipe)
    text = PretrainingText(corpus, (data / "public.jsonl",))

    def llm(text: PretrainingText = text, recipe: BaseModelsRecipe = chosen) -> Path:
        return find_base_models(text, tmp_path, recipe).llm

    others = [
        llm(replace(text, dropped_documents=(3,))),
        llm(replace(text, dropped_rows=((1,),))),
        llm(replace(text, pools=())),
        *(
            llm(recipe=replace(chosen, **{name: value}))
            for name, value in (("seed", 1), ("threads", 2), ("packed", False))
        ),
        llm(recipe=replace(chosen, llm=replace(chosen.llm, schedule="wsd"))),
    ]
    assert len({llm(), *others}) == 1 + len(others)
    assert llm(recipe=replace(chosen, processes=2)) == llm()
    assert llm(recipe=replace(chosen, slms=())) == llm()


def test_what_is_put_aside_is_spread_evenly() -> None:
    assert put_aside(list("abcdefgh"), 2) == (["a", "e"], list("bcdfgh"))
    assert put_aside(list("ab"), 5) == (["a", "b"], [])
    assert put_aside(list("ab"), 0) == ([], ["a", "b"])


def test_a_measurement_is_told_in_words() -> None:
    assert str(Measurement(5, 1000, 2.5, None)) == "1,000 tokens, text 2.500 bits a byte"


def test_every_field_of_a_recipe_is_explained() -> None:
    page = (Path(__file__).parents[2] / "docs" / "pretraining.md").read_text(encoding="utf-8")
    chosen = preset("tiny")
    fields = ({*asdict(chosen), *asdict(chosen.llm)}) - {"llm", "proxy", "slms"}
    assert {name for name in fields if f"| `{name}` |" not in page} == set()
    example = page.partition("```toml\n")[2].partition("```")[0]
    assert set(tomllib.loads(example)) <= set(asdict(chosen))
