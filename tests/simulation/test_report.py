import json
from pathlib import Path

import pytest

from simulation.errors import MeasurementError
from simulation.markdown import markdown, verdict
from simulation.report import FORMAT, read_json, write_json
from simulation.run_results import RunKey
from simulation.targets import Wanted
from tests.simulation.made_up_report import ENTRIES, LEVELS, WANTED, gate, made_up_report
from tests.simulation.made_up_runs import made_up_run


def test_the_report_compares_the_method_with_every_other_strategy() -> None:
    report = made_up_report()
    others = [each.name for each in ENTRIES if each.name != "co_plms"]
    assert list(dict.fromkeys(each.theirs for each in report.comparisons)) == others
    assert {each.theirs for each in report.over_best} == {"fedcollm"}
    best = next(each for each in report.over_best if each.metric == "rouge_l")
    assert best.relative.value == pytest.approx(50 / 42 - 1, abs=0.03)
    assert best.relative.above_zero
    assert (best.checkpoints, best.seeds) == (1, 3)
    assert {each.metric for each in report.cloud_comparisons} == {"rouge_l", "exact_match", "bits_per_byte"}


def test_summaries_are_means_over_devices_and_runs() -> None:
    runs = [made_up_run("co_plms", seed, 50.0) for seed in range(3)]
    found = made_up_report().summary("co_plms")
    phone = [run.scores["phone"]["web"].mean("rouge_l") for run in runs]
    laptop = [run.scores["laptop"]["units"].mean("rouge_l") for run in runs]
    assert found.runs == 3
    assert found.by_device["phone"]["rouge_l"] == pytest.approx(sum(phone) / 3)
    assert found.devices["rouge_l"].value == pytest.approx((sum(phone) + sum(laptop)) / 6)
    elsewhere = [run.scores["laptop"]["web"].mean("rouge_l") for run in runs]
    assert found.transfer["rouge_l"][1][1] == pytest.approx(sum(elsewhere) / 3)
    assert set(found.cloud) == {"llm", "proxy"}
    assert set(found.cloud["llm"]) == {"units", "web"}


def test_costs_are_means_and_memory_is_the_largest() -> None:
    cost = made_up_report().summary("co_plms").cost
    assert cost.cpu_seconds == {"devices": 9.0}
    assert cost.peak_memory_bytes == {"devices": 500_000_002}
    assert cost.up == {"adapter_delta": 4_000_000}
    assert cost.per_device_and_round == 2_000_000
    assert cost.per_device_and_round_with_preparation == 3_250_000


def test_curves_hold_validation_scores_and_bytes_until_then() -> None:
    report = made_up_report()
    curve = report.summary("co_plms").curve
    assert [(each.round, each.bytes_per_device) for each in curve] == [(0, 2.5e6), (1, 4.5e6), (2, 6.5e6)]
    assert curve[2].scores["rouge_l"] == pytest.approx(curve[0].scores["rouge_l"] + 2)
    assert [each.bytes_per_device for each in report.summary("standalone").curve] == [0, 0, 0]


def test_targets_that_are_met() -> None:
    report = made_up_report()
    assert [each.met for each in report.targets] == [True] * 8 + [None, None]
    assert report.targets[0].required == "at least +5.38%, interval above 0"
    assert report.targets[4].measured.startswith("0.500x (2,000,000 against 4,000,000), at equal or better quality")
    assert report.targets[5].measured == "0.010x (2,000,000 against 200,000,000)"
    assert "standalone_equal_cpu" in report.targets[8].measure


def test_targets_that_are_missed_are_said_first() -> None:
    report = made_up_report(LEVELS | {"co_plms": 42.5})
    assert [each.met for each in report.targets[:2]] == [False, False]
    lines = verdict(report)
    assert lines[0].startswith("**Target missed**: co_plms over the best of standalone, fedcollm: Rouge-L")
    assert "required: at least +5.38%" in lines[0]
    assert any(line.startswith("Baselines not run: fed_lora, fedmkt.") for line in lines)
    assert any(line.startswith("Not measured: co_plms over the control standalone_equal_cpu") for line in lines)
    page = markdown(report)
    assert page.index("**Target missed**") < page.index("## Targets")
    assert "| **not met** |" in page


def test_fewer_bytes_at_worse_quality_do_not_count() -> None:
    report = made_up_report(LEVELS | {"co_plms": 30.0})
    assert report.targets[4].met is False
    assert "at a worse mean Rouge-L or exact match" in report.targets[4].measured


def test_what_was_not_run_is_not_measured() -> None:
    wanted = Wanted(baselines=("fedmkt",), bytes_peer="fedmkt", controls=())
    report = made_up_report(wanted=wanted)
    assert [(each.met, each.measured) for each in report.targets] == [(None, "not measured")] * 6
    assert report.over_best == ()
    without = made_up_report(wanted=Wanted(method="gone"))
    assert without.comparisons == ()
    assert {each.met for each in without.targets} == {None}


def test_failed_gates_are_said_before_everything_else() -> None:
    report = made_up_report(gates=[gate("LLM leads", True), gate("proxy keeps the lead", False)])
    assert [each.name for each in report.failed_gates] == ["proxy keeps the lead"]
    assert verdict(report)[0] == "**Gate failed: proxy keeps the lead** (a figure): nothing can be said."
    assert "| proxy keeps the lead | something | a figure | **NO** |" in markdown(report)
    assert verdict(made_up_report(gates=[]))[0].startswith("**No gate was checked**")


def test_one_seed_is_said() -> None:
    lines = verdict(made_up_report(seeds=1))
    assert any(line.startswith("One base checkpoint") for line in lines)
    assert any(line.startswith("One seed of each checkpoint") for line in lines)
    assert not any(line.startswith("One seed") for line in verdict(made_up_report()))


def test_the_page_has_every_table_and_figure() -> None:
    report = made_up_report()
    page = markdown(report, figures=["figures/bars_rouge_l.svg"])
    titles = [line.removeprefix("## ") for line in page.splitlines() if line.startswith("## ")]
    assert titles == [
        "Targets",
        "Gates before training",
        "Devices",
        "Quality, mean of the devices",
        "Gains of the method, relative, on the devices' own test rows",
        "Rouge-L by device",
        "exact match, % by device",
        "bits per byte by device",
        "LLM and proxy",
        "Cost of a run (mean of the runs; memory: the largest)",
        "Transfer, co_plms: Rouge-L of a device's model on",
    ]
    assert page.endswith("![bars_rouge_l](figures/bars_rouge_l.svg)\n")
    assert "| phone | web 100 | 40 | GPT-2 1.00 M |" in page
    assert "adapter_delta 4,000,000" in page
    for table in page.split("\n## ")[1:]:
        rows = [line for line in table.splitlines() if line.startswith("|")]
        assert len({line.replace("\\|", "").count("|") for line in rows}) == 1


def test_notes_of_runs_are_shown_once() -> None:
    runs = [
        made_up_run(each.name, seed, LEVELS[each.name]).model_copy(update={"notes": ("a device dropped out",)})
        for each in ENTRIES
        for seed in (0, 1)
    ]
    page = markdown(made_up_report(runs=runs))
    assert page.count("a device dropped out") == 1
    assert f"- {', '.join(each.name for each in ENTRIES)}: a device dropped out" in page


def test_json_gives_back_the_same_report(tmp_path: Path) -> None:
    report = made_up_report()
    write_json(report, tmp_path / "new" / "quality.json")
    assert read_json(tmp_path / "new" / "quality.json") == report
    assert json.loads((tmp_path / "new" / "quality.json").read_text())["format"] == FORMAT == "cotune-quality/1"
    other = report.model_dump(mode="json") | {"format": "cotune-quality/0"}
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="cotune-quality/1"):
        read_json(tmp_path / "other.json")


def test_equal_runs_give_equal_reports() -> None:
    assert made_up_report() == made_up_report()


def test_runs_that_do_not_belong_are_refused() -> None:
    runs = [made_up_run(each.name, seed, 40.0) for each in ENTRIES for seed in (0, 1)]
    with pytest.raises(MeasurementError, match="got some of stranger"):
        made_up_report(runs=[*runs, made_up_run("stranger", 0, 40.0)])
    with pytest.raises(MeasurementError, match="runs of the strategy 'before', got none"):
        made_up_report(runs=[each for each in runs if each.key.strategy != "before"])
    without = [each for each in runs if each.key != RunKey(strategy="fedcollm", seed=1)]
    with pytest.raises(MeasurementError, match="co_plms and fedcollm in the same cells"):
        made_up_report(runs=without)
    with pytest.raises(MeasurementError, match="expected scores of llm on 'law'"):
        made_up_report(wanted=WANTED.model_copy(update={"hidden_sets": ("law",)}))
