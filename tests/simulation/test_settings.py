"""An experiment's file: what is common is dealt out, and every mistake is told at once with its place."""

from pathlib import Path
from typing import Any

import pytest

from protocol.strategies import CoPlmsSettings, FedMktSettings
from simulation.errors import SetupError
from simulation.settings import read_settings, settings_of

HEAD = """
name = "x"
rounds = 2
llm = "llm"
slms = ["slm"]
"""


def read(folder: Path, text: str) -> str:
    """What is said of a file that cannot be used."""
    path = folder / "experiment.toml"
    path.write_text(text)
    with pytest.raises(SetupError) as caught:
        read_settings(path)
    return str(caught.value)


def table(*strategies: dict[str, Any], **common: Any) -> dict[str, Any]:
    return {"name": "x", "rounds": 1, "slms": ["slm"], "common": common, "strategies": list(strategies)}


def test_common_settings_go_to_the_strategies_that_have_them_and_give_way_to_their_own() -> None:
    settings = settings_of(
        table(
            {"name": "co_plms", "training": {"learning_rate": 0.5}, "proxy_lora": {"rank": 2}},
            {"name": "standalone", "label": "alone", "kind": "control"},
            training={"steps": 7, "learning_rate": 0.25},
            proxy_lora={"rank": 3, "alpha": 6.0},
        )
    )
    co_plms, alone = settings.strategies
    assert isinstance(co_plms.settings, CoPlmsSettings)
    assert (co_plms.settings.training.steps, co_plms.settings.training.learning_rate) == (7, 0.5)
    assert (co_plms.settings.proxy_lora.rank, co_plms.settings.proxy_lora.alpha) == (2, 6.0)
    assert (alone.label, alone.kind, alone.settings.training.learning_rate) == ("alone", "control", 0.25)
    assert co_plms.label == "co_plms"


def test_every_mistake_is_told_with_its_place(tmp_path: Path) -> None:
    said = read(
        tmp_path,
        """
rounds = 0
slms = []
colour = "red"
[proxy]
layers = "two"
[[strategies]]
name = "co_plms"
label = "mine"
alpha = -1
[[strategies]]
name = "standalone"
training = { steps = 0 }
[[strategies]]
name = "magic"
""",
    )
    assert "field(s) cannot be used" in said
    for line in (
        "- name: Field required",
        "- rounds: Input should be greater than or equal to 1, got 0",
        "- slms: List should have at least 1 item after validation, not 0, got []",
        "- proxy.layers: Input should be a valid integer, unable to parse string as an integer, got 'two'",
        "- strategies.mine.alpha: Input should be greater than or equal to 0, got -1",
        "- strategies.standalone.training.steps: Input should be greater than or equal to 1, got 0",
        "- colour: Extra inputs are not permitted, got 'red'",
    ):
        assert line in said.splitlines(), line
    assert "strategies.magic: Input tag 'magic' found using 'name' does not match any of the expected tags" in said


def test_a_common_field_that_no_strategy_has_is_a_mistake(tmp_path: Path) -> None:
    said = read(tmp_path, HEAD + '[common]\nsteps = 3\n[[strategies]]\nname = "standalone"\n')
    assert "- common: Extra inputs are not permitted, got {'steps': 3}" in said


def test_every_strategy_has_the_same_budget_but_controls(tmp_path: Path) -> None:
    unequal = '[[strategies]]\nname = "co_plms"\n[[strategies]]\nname = "standalone"\ntraining = { steps = 61 }\n'
    said = read(tmp_path, HEAD + unequal)
    assert "the same budget of a device's SLM a round" in said
    assert "co_plms 60 steps of 16 rows, standalone 61 steps of 16 rows" in said
    path = tmp_path / "control.toml"
    path.write_text(HEAD + unequal + 'kind = "control"\n')
    assert [each.settings.slm_steps for each in read_settings(path).strategies] == [60, 61]


def test_steps_on_the_llms_logits_are_in_the_budget() -> None:
    entry = settings_of(table({"name": "fedmkt", "training": {"steps": 5}, "transfer_steps": 2})).strategies[0]
    assert isinstance(entry.settings, FedMktSettings)
    assert entry.settings.slm_steps == 7


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name = ", "expected TOML"),
        (
            HEAD + '[[strategies]]\nname = "standalone"\n' * 2,
            "expected a `label` of its own for each strategy, got standalone twice",
        ),
        (HEAD + '[[strategies]]\nname = "standalone"\nlabel = "before"\n', "expected other labels than 'before'"),
        (HEAD + '[devices]\nalpha = 0.5\n[[strategies]]\nname = "standalone"\n', "`alpha` needs `count` and `size`"),
        (HEAD + '[devices]\ncount = 3\n[[strategies]]\nname = "standalone"\n', "`count` and `size` are for `alpha`"),
    ],
    ids=["no TOML", "twice", "before", "alpha alone", "count alone"],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, text: str, said: str) -> None:
    assert said in read(tmp_path, text)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"expected a TOML file at .*No such file"):
        read_settings(tmp_path / "none.toml")
