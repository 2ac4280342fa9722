"""What cannot be played is told before anything trains, all of it at once."""

import shutil
from pathlib import Path

import pytest

from simulation.errors import SetupError
from simulation.reporting import public_gate
from simulation.setup import set_up
from tests.simulation.tiny_world import CO_PLMS, World

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
    assert (len(kept.public), kept.left_out) == (21, 0)
    gate = public_gate(kept)
    assert gate is not None
    assert not gate.passed
    without = set_up(copied.settings(drop_contaminated=True), copied.data, [0])
    assert without.left_out >= 1
    assert len(without.public) + without.left_out == 21
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
