import gzip
import json
import os
import threading
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from command_line import base_model_builder, base_models, demo_settings
from command_line.base_model_recipes import BaseModelsRecipe
from command_line.base_model_texts import read_texts
from command_line.base_models import BaseModels, demo_text
from command_line.errors import BadInput

ROWS = [
    {"id": str(number), "instruction": "Is it even?", "input": str(number), "output": "no" if number % 2 else "yes"}
    for number in range(60)
]


def small(recipe: BaseModelsRecipe) -> BaseModelsRecipe:
    """The demo's own kinds of models, but tiny and hardly trained."""

    def shrunk(model):
        return replace(model, vocab_size=400, hidden_size=16, layers=1, heads=2, steps=2, batch_size=4)

    slms = tuple(shrunk(each) for each in recipe.slms)
    return replace(recipe, llm=shrunk(recipe.llm), proxy=shrunk(recipe.proxy), slms=slms, max_length=32)


RECIPE = small(demo_settings.FACTS.base_models)


def data_folder(folder: Path, rows=ROWS) -> Path:
    folder.mkdir()
    (folder / "public.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "corpus.txt.gz").write_bytes(gzip.compress(b"One follows none.\n\nTwo follows one.\n"))
    return folder


def ensure_base_models(data: Path, cache: Path, recipe: BaseModelsRecipe, on_progress) -> BaseModels:
    return base_models.ensure_base_models(demo_text(data), cache / "base_models", recipe, on_progress)


def find_base_models(data: Path, cache: Path, recipe: BaseModelsRecipe) -> BaseModels:
    return base_models.find_base_models(demo_text(data), cache / "base_models", recipe)


def nobody(*_: object) -> None:
    """Progress that nobody looks at."""


def children() -> list[psutil.Process]:
    return [
        each for each in psutil.Process().children(recursive=True) if "base_model_builder" in " ".join(each.cmdline())
    ]


def job_of(data: Path, recipe: BaseModelsRecipe, folder: Path) -> dict:
    return base_models._job(demo_text(data), folder.parent, recipe, {str(folder): recipe.llm}) | {"command": ""}


def build(job: dict) -> None:
    texts = read_texts(job)
    base_model_builder.make_tokenizers(job, texts)
    base_model_builder.build_models(job, texts)


def test_builds_every_model_once_and_each_loads_like_any_other(tmp_path):
    data, cache = data_folder(tmp_path / "data"), tmp_path / "cache"
    progress: list[tuple[str, int, int]] = []
    models = ensure_base_models(data, cache, RECIPE, lambda *each: progress.append(each))
    assert {name for name, _, _ in progress} == {model.name for model in RECIPE.models}
    assert all((model.name, 2, 2) in progress for model in RECIPE.models)
    vocabularies: list[str] = []
    for model, folder in zip(RECIPE.models, models.all, strict=True):
        loaded, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        assert loaded.config.model_type == model.architecture
        assert loaded.get_input_embeddings().weight.shape[0] == len(tokenizer)
        assert tokenizer.pad_token_id != tokenizer.eos_token_id == loaded.generation_config.eos_token_id
        vocabularies.append(json.dumps(tokenizer.get_vocab(), sort_keys=True))
    llm, proxy, *slms = vocabularies
    assert proxy == llm
    assert len({llm, *slms}) == 1 + len(slms)
    assert not [each.name for each in (cache / "base_models").iterdir() if "unfinished" in each.name]

    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    progress.clear()
    assert ensure_base_models(data, cache, RECIPE, lambda *each: progress.append(each)) == models
    assert progress == []
    assert before == {path: path.stat().st_mtime_ns for path in cache.rglob("*")}


def test_a_model_is_found_by_its_recipe_and_its_data(tmp_path):
    data = data_folder(tmp_path / "data")
    first = find_base_models(data, tmp_path, RECIPE)
    assert first == find_base_models(data_folder(tmp_path / "copy"), tmp_path, RECIPE)
    longer = replace(RECIPE, llm=replace(RECIPE.llm, steps=3))
    assert find_base_models(data, tmp_path, longer).llm != first.llm
    assert find_base_models(data, tmp_path, longer).slms == first.slms
    assert find_base_models(data, tmp_path, replace(RECIPE, seed=1)).slms[0] != first.slms[0]
    (data / "web").mkdir()
    (data / "web" / "train.jsonl").write_text("private")
    assert find_base_models(data, tmp_path, RECIPE) == first
    (data / "corpus.txt.gz").unlink()
    assert find_base_models(data, tmp_path, RECIPE).llm != first.llm


def test_nothing_runs_on_when_the_caller_stops(tmp_path):
    class Stopped(Exception):
        pass

    def stop(*_):
        assert children()
        raise Stopped

    with pytest.raises(Stopped):
        ensure_base_models(data_folder(tmp_path / "data"), tmp_path / "cache", RECIPE, stop)
    assert children() == []


def test_broken_data_is_named_with_its_line(tmp_path):
    data = data_folder(tmp_path / "data", [*ROWS[:3], {"instruction": "No answer."}])
    with pytest.raises(BadInput, match=r"public\.jsonl:4.*output"):
        ensure_base_models(data, tmp_path / "cache", RECIPE, nobody)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_without_permission_is_named(tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o500)
    with pytest.raises(BadInput, match="can be written"):
        ensure_base_models(data_folder(tmp_path / "data"), cache, RECIPE, nobody)


def test_a_cache_that_is_no_folder_is_named(tmp_path):
    cache = tmp_path / "cache"
    cache.write_text("a file")
    with pytest.raises(BadInput, match="cache"):
        ensure_base_models(data_folder(tmp_path / "data"), cache, RECIPE, nobody)


def test_two_builders_of_one_model_build_it_once(tmp_path, capfd):
    folder = tmp_path / "llm"
    job = job_of(data_folder(tmp_path / "data"), RECIPE, folder)
    threads = [threading.Thread(target=build, args=(job,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert lines.count(["llm", 0, 2]) == 2
    assert lines.count(["llm", 2, 2]) == 1
    assert (folder / "model.safetensors").is_file()


def test_what_a_killed_builder_left_is_no_obstacle(tmp_path):
    folder = tmp_path / "llm"
    (tmp_path / ".llm.unfinished").mkdir()
    (tmp_path / ".llm.unfinished" / "model.safetensors").write_bytes(b"half")
    (tmp_path / "llm.lock").touch()
    build(job_of(data_folder(tmp_path / "data"), RECIPE, folder))
    assert AutoModelForCausalLM.from_pretrained(folder).config.model_type == "llama"
    assert not (tmp_path / ".llm.unfinished").exists()


def test_equal_recipes_give_equal_models(tmp_path):
    data = data_folder(tmp_path / "data")
    for name in ("first", "second"):
        build(job_of(data, RECIPE, tmp_path / name))
    for file in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


@pytest.mark.parametrize(
    ("processor", "precision"),
    [
        ("flags : fpu avx512f amx_bf16 amx_tile", "bfloat16"),
        ("flags : fpu avx512f avx512_bf16", "bfloat16"),
        ("flags : fpu avx512f", "float32"),
        ("", "float32"),
    ],
)
def test_bfloat16_only_where_the_processor_multiplies_it(processor, precision):
    assert demo_settings.fast_precision(processor) == precision


@pytest.mark.parametrize("given", [False, True])
def test_both_runs_give_a_device_the_same_steps(given, tmp_path):
    common = {"rounds": 3, "devices": 3, "given": given}
    alone = demo_settings.standalone_run(**common)
    together = demo_settings.co_plms_run(
        **common,
        llm=tmp_path / "llm",
        proxy=tmp_path / "proxy",
        public_data=tmp_path / "public.jsonl",
        evaluation_data=tmp_path / "mix.jsonl",
    )
    assert alone.strategy.training == together.strategy.training
    assert alone.strategy.slm_lora == together.strategy.slm_lora
    assert alone.rounds == together.rounds == 3
    assert alone.evaluation == together.evaluation
    assert type(together).model_validate(together.model_dump(mode="json")) == together


def test_the_demos_slms_share_neither_architecture_nor_tokenizer_with_any_other_model():
    for settings in (demo_settings.FACTS, demo_settings.GIVEN):
        models = (settings.base_models.llm, *settings.base_models.slms)
        assert len({model.architecture for model in models}) == len(models) == 4
        assert len({model.tokenizer for model in models}) == len(models)


def test_the_proxy_is_a_smaller_llm():
    for settings in (demo_settings.FACTS, demo_settings.GIVEN):
        llm, proxy = settings.base_models.llm, settings.base_models.proxy
        assert (proxy.architecture, proxy.tokenizer, proxy.vocab_size) == (
            llm.architecture,
            llm.tokenizer,
            llm.vocab_size,
        )
        assert proxy.layers < llm.layers
        assert proxy.hidden_size < llm.hidden_size
