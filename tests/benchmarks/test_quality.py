"""The benchmark of quality: its sizes fit together, what is wrong is told first, and a whole one at a few rows."""

import gzip
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from assets.corpora import read_documents
from assets.data import read_examples
from assets.data_folders import LARGE_POOL_FILE, PUBLIC_FILE, SPLITS, domains_of, pool_of
from benchmarks import quality, quality_settings
from benchmarks.quality import Places, main, measure
from benchmarks.quality_base_models import documents_of
from benchmarks.quality_data import data_of
from benchmarks.quality_settings import SETTINGS, read_preset, sizes
from command_line.errors import BadInput
from command_line.exit_codes import ExitCode
from cotuning.examples import Example
from simulation.report import QualityReport
from simulation.setup import check_data
from tests.benchmarks.quality_miniature import made_data, preset_file, quiet


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_data(tmp_path_factory.mktemp("quality"))


@pytest.mark.parametrize("name", ["facts", "tiny", "small", "medium"])
def test_a_size_fits_together(name: str) -> None:
    preset = read_preset(name)
    for setting in SETTINGS:
        settings = preset.settings(setting, 0)
        kinds = {each.label: each.kind for each in settings.strategies}
        assert [label for label, kind in kinds.items() if kind == "method"] == ["co_plms"]
        assert {"standalone", "fedmkt", "standalone_equal_cpu"} <= set(kinds)
        assert settings.drop_contaminated
        assert settings.longest_row <= preset.recipe.positions
        assert len(set(settings.slms)) == len(settings.slms)
        assert (len(settings.slms) == 1) == (setting == "homogeneous")
    assert {"fed_lora", "fedcollm", "fedcollm_sequential"} <= set(kinds)
    controls = {each.label for each in preset.settings("heterogeneous", 0).strategies if each.kind == "control"}
    assert controls >= {"uninformed_proxy", "frozen_proxy", "llm_public", "standalone_smoothed"}
    assert preset.size.seeds >= (5 if name in {"facts", "tiny"} else 3)
    assert preset.size.generated or preset.settings("heterogeneous", 0).public.leave_out_domains


def test_there_are_no_other_sizes() -> None:
    assert sizes() == ["facts", "medium", "small", "tiny"]


def test_the_largest_size_leaves_no_strategy_out() -> None:
    preset = read_preset("medium")
    listed = [tomllib.loads((quality_settings.FOLDER / f"{name}.toml").read_text())["strategies"] for name in SETTINGS]
    for setting, entries in zip(SETTINGS, listed, strict=True):
        labels = [each.label for each in preset.settings(setting, 0).strategies]
        assert labels == [each.get("label", each["name"]) for each in entries]


def test_controls_differ_from_the_method_by_one_thing() -> None:
    settings = read_preset("medium").settings("heterogeneous", 0)
    played = {each.label: each for each in settings.strategies}
    method = played["co_plms"].settings.model_dump()

    def differences(label: str) -> dict[str, Any]:
        own = played[label].settings.model_dump()
        return {name: value for name, value in own.items() if value != method[name]}

    assert differences("frozen_proxy") == {"freeze_proxy": True}
    assert differences("llm_public") == {"matching": "ce_only"}
    assert differences("uninformed_proxy") == differences("undistilled_proxy") == {}
    proxies = [played[label].proxy for label in ("uninformed_proxy", "undistilled_proxy")]
    assert [(each.source, each.steps) for each in proxies if each] == [("config", 0), ("pretrained", 0)]
    alone = played["standalone"].settings.training
    smoothed = played["standalone_smoothed"].settings.training
    assert smoothed == alone.model_copy(update={"label_smoothing": 0.1})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seeds = 2": "seeds = 0"}, "seeds: Input should be greater than or equal to 1"),
        ({"seeds = 2": "seedz = 2"}, "seedz: Extra inputs are not permitted"),
        ({'slms = ["slm"]': 'slms = ["nobody"]'}, "expected models of the recipe, llm, proxy, slm, other; got nobody"),
        ({"training = { steps = 2": "training = { steps = 0"}, "training.steps: Input should be greater than or equal"),
        ({"seeds = 2": "seeds = 2\nsearch = { others = [{}], fedmkt = [] }"}, "as often, got others 1, fedmkt 0"),
        ({'skip = ["uninformed_proxy"]': 'skip = ["nothing"]'}, "expected `skip` among co_plms, .*; got nothing"),
    ],
)
def test_a_size_that_cannot_be_used(tmp_path: Path, changes: dict[str, str], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        read_preset(preset_file(tmp_path, **changes))


def test_a_size_that_is_not_there() -> None:
    with pytest.raises(BadInput, match=r"expected PRESET to be one of facts, .*, tiny, or a TOML file; got huge"):
        read_preset("huge")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda data: (data / "sum" / "test.jsonl").unlink(), "missing: .*sum/test.jsonl"),
        (lambda data: [path.unlink() for path in (data / "sum").iterdir()], "got sum"),
        (lambda data: (data / "corpus.txt").unlink(), "expected what the base models read at .*corpus.txt"),
        (lambda data: (data / PUBLIC_FILE).write_text(""), "public.jsonl: expected public rows, got none that"),
    ],
    ids=["split", "domain", "corpus", "public"],
)
def test_what_is_wrong_is_told_before_anything_trains(data: Path, tmp_path: Path, spoil: Any, said: str) -> None:
    spoilt = tmp_path / "data"
    for path in data.rglob("*.*"):
        target = spoilt / path.relative_to(data)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    spoil(spoilt)
    cache = tmp_path / "cache"
    cache.mkdir()
    with quiet() as (shown, _), pytest.raises(BadInput, match=said):
        measure(read_preset(preset_file(tmp_path)), Places(spoilt, cache, tmp_path / "out"), shown, command="")
    assert list(cache.iterdir()) == []


def test_a_size_that_makes_its_data_takes_none_and_any_other_needs_some(tmp_path: Path) -> None:
    facts, tiny = read_preset("facts"), read_preset("tiny")
    with data_of(facts, None) as made:
        assert domains_of(made) == ["calendar", "units", "web"]
        check_data(facts.settings("homogeneous", 0), made, range(facts.size.seeds))
        assert pool_of(made).is_file()
        assert (made / facts.size.corpus).is_file()
    assert not made.exists()
    with pytest.raises(BadInput, match=f"facts: expected no data folder: .* got {tmp_path}"), data_of(facts, tmp_path):
        pass
    with pytest.raises(BadInput, match="tiny: expected a data folder; got none"), data_of(tiny, None):
        pass


def test_a_size_that_names_tasks_has_them_for_domains_and_no_other_rows(data: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    for split in SPLITS:
        (mixed / "all").mkdir(parents=True, exist_ok=True)
        lines = [line for name in domains_of(data) for line in _lines(data / name / f"{split}.jsonl")]
        (mixed / "all" / f"{split}.jsonl").write_text("".join(lines))
    (mixed / PUBLIC_FILE).write_text("".join(_lines(data / PUBLIC_FILE)))
    with gzip.open(mixed / LARGE_POOL_FILE, "wt") as file:
        file.writelines(_lines(data / PUBLIC_FILE))
    instruction = read_examples(data / "sum" / "train.jsonl")[0].instruction
    of_sums = [f"Instruction: {instruction}\nInput: {n} + 1\nOutput: {n + 1}" for n in range(90, 93)]
    (mixed / "corpus.txt").write_text("\n\n".join([*of_sums[:2], "Once upon a time.", of_sums[2]]))
    named = {"seeds = 2": 'seeds = 2\ntasks = ["sums"]'}
    with data_of(read_preset(preset_file(tmp_path, **named)), mixed) as narrowed:
        assert domains_of(narrowed) == ["sums"]
        for split in SPLITS:
            assert _lines(narrowed / "sums" / f"{split}.jsonl") == _lines(data / "sum" / f"{split}.jsonl")
        rows = [read_examples(narrowed / name) for name in (PUBLIC_FILE, LARGE_POOL_FILE)]
        assert rows[0] == rows[1] == [row for row in read_examples(data / PUBLIC_FILE) if row.task == "sums"] != []
        assert read_documents(narrowed / "corpus.txt") == of_sums
    pooled = {"seeds = 2": 'seeds = 2\npublic_pool = true\ntasks = ["sums"]'}
    with data_of(read_preset(preset_file(tmp_path, **pooled)), mixed) as narrowed:
        assert read_examples(narrowed / PUBLIC_FILE) == rows[0] + rows[1]
        assert read_examples(narrowed / LARGE_POOL_FILE) == rows[1]
    (mixed / LARGE_POOL_FILE).unlink()
    with (
        pytest.raises(BadInput, match="expected the large pool of public rows at"),
        data_of(read_preset(preset_file(tmp_path, **pooled)), mixed),
    ):
        pass
    with pytest.raises(BadInput, match="expected `tasks` where `public_pool` is true, got none"):
        read_preset(preset_file(tmp_path, **{"seeds = 2": "seeds = 2\npublic_pool = true"}))
    (mixed / "corpus.txt").write_text("Once upon a time.")
    with (
        pytest.raises(BadInput, match=r"corpus.txt: expected documents of sums; none is told to be of one"),
        data_of(read_preset(preset_file(tmp_path, **named)), mixed),
    ):
        pass
    (mixed / "all" / "test.jsonl").write_text("[]\n")
    with (
        pytest.raises(BadInput, match=r"all/test.jsonl, line 1: expected a JSON object, got '\[\]"),
        data_of(read_preset(preset_file(tmp_path, **named)), mixed),
    ):
        pass
    other = {"seeds = 2": 'seeds = 2\ntasks = ["sums", "plots"]'}
    with (
        pytest.raises(BadInput, match="rows of every task that miniature names; got none of plots: train, plots: val"),
        data_of(read_preset(preset_file(tmp_path, **other)), data),
    ):
        pass


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines(keepends=True)


def test_documents_that_are_of_hidden_tasks() -> None:
    hidden = [Example(str(n), "Name the intent.", "hello", "card arrival", "intent") for n in range(5)]
    hidden.append(Example("x", "Choose.", "a or b", "yes", "choice"))
    others = [*hidden, Example("y", "Choose.", "c or d", "no", "other")]
    documents = [
        "Instruction: Name the intent.\nInput: hi\nOutput: failed transfer",  # its instruction
        "where is it?\ncard arrival",  # its label
        "Question: where?\nAnswer: card arrival",
        "The card arrival was late.",
        "Instruction: Choose.\nOutput: yes",  # an instruction that others have, and no label of two words
    ]
    assert documents_of(documents, hidden, others) == [0, 1, 2]


def test_a_whole_benchmark_is_played_kept_and_shown(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preset, out = read_preset(preset_file(tmp_path)), tmp_path / "out"
    places = Places(data, tmp_path / "cache", out)
    with quiet() as (shown, said):
        written = measure(preset, places, shown, command="make bench-quality", processes=1)
    assert written == out / "quality-miniature.md"
    text = written.read_text()
    for each in (
        "# Quality, miniature",
        "## Heterogeneous",
        "### Targets",
        "## Homogeneous",
        "Only devices hold: sum.",
    ):
        assert each in text
    assert str(tmp_path) not in text
    content = json.loads((out / "quality-miniature.json").read_text())
    assert str(tmp_path) not in json.dumps(content["settings"])
    reports = {name: QualityReport.model_validate(each) for name, each in content["settings"].items()}
    assert [each.entry.name for each in reports["homogeneous"].strategies][:3] == ["before", "co_plms", "standalone"]
    heterogeneous = reports["heterogeneous"]
    assert [each.metric for each in heterogeneous.cloud_comparisons] == ["rouge_l", "exact_match", "bits_per_byte"]
    assert {"llm", "proxy"} <= set(heterogeneous.summary("co_plms").cloud)
    assert len(heterogeneous.gates) == 4
    controls = [each for each in heterogeneous.targets if "over the control" in each.measure]
    assert controls
    assert all(each.value is not None for each in controls)
    linked = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert len(linked) > 10
    assert all((out / each).is_file() for each in linked)
    assert any("left out, of sum: " in each and "rows of the pool" in each for each in said)
    assert re.search(r"Not read: \d+ documents and \d+ rows", text)
    assert "| slm | gpt2 | 1 x 8 | bpe_whole_numbers, 300 |" in text

    # The same again: nothing is trained, the figures are the same.
    figure = (out / linked[0]).read_bytes()
    with quiet() as (shown, said):
        measure(preset, places, shown, command="make bench-quality")
    assert any("4 there already" in each for each in said)
    assert all(" 0 to play" in each for each in said if " to play" in each)
    assert (out / linked[0]).read_bytes() == figure
    # A kept result that is damaged is told of before anything is played.
    kept = next((tmp_path / "cache" / "simulations").glob("*/standalone-seed1-0.json"))
    kept.write_bytes(kept.read_bytes()[:50])
    arguments = [preset_file(tmp_path), "--data", str(data), "--cache", str(tmp_path / "cache"), "--out", str(out)]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == ExitCode.BAD_INPUT
    assert "expected a whole JSON file, got 50 bytes" in capsys.readouterr().err


def test_the_pages_are_in_the_documents_folder() -> None:
    assert Path(__file__).parents[2] / "docs" / "results" == quality.PAGES
