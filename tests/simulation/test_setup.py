"""What cannot be played is told before anything trains, all of it at once."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from simulation.errors import SetupError
from simulation.experiment import run_experiment
from simulation.reporting import public_gate, report_of
from simulation.setup import set_up
from tests.simulation.tiny_world import CO_PLMS, World
from tests.tiny_models import tiny_examples

STANDALONE = {"name": "standalone"}
FED_LORA = {"name": "fed_lora"}


@pytest.fixture
def copied(world: World, tmp_path: Path) -> World:
    """The world's own copy, to spoil."""
    shutil.copytree(world.folder, tmp_path / "world")
    return World(tmp_path / "world")


def problems(world: World, *strategies: dict[str, object], **changes: object) -> str:
    with pytest.raises(SetupError) as caught:
        set_up(world.settings(*strategies, **changes), world.data, [0])
    return str(caught.value)


def test_devices_get_their_rows_and_models_in_turn(world: World) -> None:
    experiment = set_up(world.settings(devices={"per_domain": 2}), world.data, [0, 3])
    devices = experiment.devices[3]
    assert [device.name for device in devices] == ["colour-1", "colour-2", "sum-1", "sum-2"]
    assert [Path(device.slm).name for device in devices] == ["gpt2", "qwen2", "gpt2", "qwen2"]
    assert {len(device.rows.train) for device in devices} == {4}
    assert {len(device.rows.test) for device in devices} == {3}
    assert [row.id for row in devices[0].rows.train] != [row.id for row in experiment.devices[0][0].rows.train]


def test_mixtures_of_domains(world: World) -> None:
    mixed = {"alpha": 0.5, "count": 2, "size": 6}
    devices = set_up(world.settings(STANDALONE, devices=mixed, probe_rows=1), world.data, [0]).devices[0]
    assert [sum(device.rows.mixture.values()) for device in devices] == [6, 6]


def test_a_domain_without_a_split(copied: World) -> None:
    (copied.data / "sum" / "validation.jsonl").unlink()
    assert "missing: " in problems(copied)
    assert str(copied.data / "sum" / "validation.jsonl") in problems(copied)


def test_fewer_than_two_devices(world: World) -> None:
    assert "expected at least 2 devices, got 1" in problems(world, devices={"domains": ["sum"]})


def test_one_small_model_is_needed_where_adapters_of_it_are_averaged(world: World) -> None:
    said = problems(world, FED_LORA)
    assert "strategy fed_lora (fed_lora) averages adapters of one small model with one tokenizer" in said
    assert world.model("gpt2") in said
    assert world.model("qwen2") in said


def test_a_model_folder_without_tokenizer(copied: World) -> None:
    for path in Path(copied.model("gpt2")).glob("*token*"):
        path.unlink()
    said = problems(copied)
    assert f"{copied.model('gpt2')}: expected the files of a tokenizer (tokenizer.json), found config.json, " in said


def test_a_model_that_reads_less_than_the_experiment_asks_for(world: World) -> None:
    said = problems(world, measured_length=254)
    assert said.startswith("3 thing(s)")
    assert f"{world.model('qwen2')}: expected a model that reads 258 tokens, it reads 256" in said


def test_everything_is_told_at_once(copied: World) -> None:
    (copied.data / "public.jsonl").unlink()
    said = problems(
        copied,
        CO_PLMS,
        FED_LORA,
        llm=None,
        slms=[copied.model("gpt2"), str(copied.folder / "nothing")],
        devices={"domains": ["sum", "letters"]},
    )
    assert said.startswith("5 thing(s) to correct")
    for part in (
        "nothing: expected a model folder, found nothing there",
        "expected domains among colour, sum; got letters",
        "strategy co_plms (co_plms): expected `llm` to name a model, got none",
        f"strategy co_plms (co_plms): expected public rows at {copied.data / 'public.jsonl'}, found no file",
        "strategy fed_lora (fed_lora) averages",
    ):
        assert part in said, part


def test_too_few_public_rows(world: World) -> None:
    assert "expected at least 21 different public rows (4 to validate, 16 to probe, 1 to train), got 20" in problems(
        world, probe_rows=16
    )


@pytest.mark.parametrize(
    ("devices", "said"),
    [
        ({"ranks": [2]}, "expected `devices.ranks` to name a rank for each of 2 devices, got 1"),
        ({"fewest": 3}, "expected fewest between 1 and the 2 devices, got 3"),
        ({"sizes": [2, 9]}, "sum has 8, asked for are 9"),
    ],
    ids=["ranks", "fewest", "sizes"],
)
def test_devices_that_the_data_does_not_allow(world: World, devices: dict[str, object], said: str) -> None:
    assert said in problems(world, devices=devices)


def test_public_rows_that_hold_a_private_one_are_left_out_where_that_is_asked_for(copied: World) -> None:
    path = copied.data / "public.jsonl"
    private = (copied.data / "sum" / "test.jsonl").read_bytes().splitlines(keepends=True)[0]
    path.write_bytes(path.read_bytes() + private)
    kept = set_up(copied.settings(), copied.data, [0])
    assert (len(kept.public), kept.left_out) == (21, {})
    gate = public_gate(kept)
    assert gate is not None
    assert not gate.passed
    without = set_up(copied.settings(drop_contaminated=True), copied.data, [0])
    assert without.left_out["hold a private, validation or test row"] >= 1
    assert len(without.public) + sum(without.left_out.values()) == 21
    gate = public_gate(without)
    assert gate is not None
    assert gate.passed


def test_what_results_depend_on(world: World) -> None:
    def hashed(**changes: object) -> object:
        experiment = set_up(world.settings(**changes), world.data, [0])
        return experiment.configuration(experiment.settings.strategies[0], 0)

    same = hashed()
    assert hashed(name="other") == same
    assert hashed(strategies=world.table()["strategies"][:1]) == same
    assert hashed(rounds=3) != same
    assert hashed(slms=[world.model("qwen2")]) != same
    assert hashed(devices={"sizes": 4}) != same


def name_tasks(world: World) -> None:
    """Give every row the task of its kind; the public rows are all sums."""
    for path in world.data.rglob("*.jsonl"):
        task = "sums" if path.parent.name in ("sum", "data") else "colours"
        rows = [json.loads(line) | {"task": task} for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_public_rows_of_domains_that_only_devices_hold_are_left_out(copied: World) -> None:
    name_tasks(copied)
    with (copied.data / "public.jsonl").open("a") as file:
        for number in range(16):
            file.write(json.dumps(asdict(tiny_examples(1, start=900 + number)[0]) | {"task": "colours"}) + "\n")
    experiment = set_up(copied.settings(public={"leave_out_domains": ["sum"]}), copied.data, [0])
    assert {row.task for row in experiment.public} == {"colours"}
    assert (len(experiment.public), experiment.left_out) == (16, {"of domains that only devices hold": 20})
    public_alone = CO_PLMS | {"label": "llm_public", "kind": "control", "matching": "ce_only"}
    settings = copied.settings(CO_PLMS | {"kind": "method"}, public_alone, public={"leave_out_domains": ["sum"]})
    experiment = set_up(settings, copied.data, [0])
    report = report_of(experiment, run_experiment(experiment, copied.folder), command="", gates=[], seconds=0.0)
    found = {each.measure: each for each in report.targets if "device-only" in each.measure}
    assert [each.metric for each in report.cloud_comparisons] == ["rouge_l", "exact_match", "bits_per_byte"]
    assert all(each.value is not None for each in found.values())
    own = report.summary("co_plms").cloud["llm"]["sum"]["bits_per_byte"]
    assert next(each for each in report.cloud_comparisons if each.metric == "bits_per_byte").our_score == own


@pytest.mark.parametrize(
    ("domain", "said"),
    [
        ("nowhere", "expected `public.leave_out_domains` among the devices' domains, colour, sum; got nowhere"),
        ("sum", "expected a `task` in every row of sum, by which public rows are left out"),
    ],
)
def test_domains_that_cannot_be_left_out(world: World, domain: str, said: str) -> None:
    assert said in problems(world, public={"leave_out_domains": [domain]})


def test_public_rows_without_a_task_cannot_be_told_apart(copied: World) -> None:
    name_tasks(copied)
    shutil.copy(copied.data / "public.jsonl", copied.data / "named.jsonl")
    rows = [json.loads(line) | {"task": ""} for line in (copied.data / "named.jsonl").read_text().splitlines()]
    (copied.data / "public.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "public.jsonl: expected a `task` in every row" in problems(copied, public={"leave_out_domains": ["sum"]})
