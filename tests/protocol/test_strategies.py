"""Strategies as data: what each declares, and what an installed distribution may add."""

import json
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from protocol.runs import RunCreate
from protocol.statuses import PartKind
from protocol.strategies import (
    STRATEGIES,
    CoPlmsSettings,
    DownloadKind,
    MessageKind,
    PrivateRows,
    PublicSet,
    SmallModel,
    StandaloneSettings,
    Strategy,
    StrategySettings,
    StrategySpec,
    spec_of,
)
from protocol.strategies.registry import BUILT_IN, ENTRY_POINT_GROUP, StrategyNotUsable, collect

PLUGIN = '''
from typing import Literal
from protocol.strategies import StrategySettings, StrategySpec

class QuietSettings(StrategySettings):
    """Nothing is trained."""

    name: Literal["quiet"] = "quiet"

SPEC = StrategySpec(settings=QuietSettings, steps="quiet_strategy:Quiet")
class OtherSettings(StrategySettings):
    name: Literal["co_plms"] = "co_plms"

SAME_NAME = StrategySpec(settings=OtherSettings, steps="quiet_strategy:Quiet")
'''


def install(folder: Path, module: str, content: str, *values: str) -> Path:
    """A distribution as pip leaves it: a module, and the folder that names its entry points."""
    (folder / f"{module}.py").write_text(content)
    about = folder / f"{module}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    lines = [f"entry_{number} = {value}" for number, value in enumerate(values)]
    (about / "entry_points.txt").write_text("\n".join([f"[{ENTRY_POINT_GROUP}]", *lines]) + "\n")
    return folder


def entry(value: str) -> EntryPoint:
    return EntryPoint("theirs", value, ENTRY_POINT_GROUP)


@pytest.fixture
def importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("quiet_strategy", None)


def test_what_co_plms_and_standalone_let_cross_the_network() -> None:
    co_plms, standalone = STRATEGIES["co_plms"], STRATEGIES["standalone"]
    assert co_plms.uploads == {PartKind.ADAPTER_DELTA, PartKind.LOGITS}
    assert co_plms.downloads == {DownloadKind.PROXY_BASE, DownloadKind.ADAPTER, DownloadKind.PROBE_SET}
    assert (co_plms.small_model, co_plms.public_set) == (SmallModel.DISTILLED_PROXY, PublicSet.SERVER_AND_DEVICES)
    assert co_plms.trains_llm
    assert (standalone.uploads, standalone.downloads) == (frozenset(), frozenset())
    assert (standalone.small_model, standalone.public_set) == (SmallModel.NONE, PublicSet.NOWHERE)
    assert not standalone.needs_llm


@pytest.mark.parametrize("spec", BUILT_IN, ids=lambda spec: spec.name)
def test_settings_and_spec_of_a_strategy_agree(spec: StrategySpec) -> None:
    """What the services ask of the settings is there exactly where the spec says so."""
    settings = spec.settings()
    assert spec_of(settings) is spec
    assert TypeAdapter(Strategy).validate_json(settings.model_dump_json()) == settings
    assert (settings.shared_lora is not None) == (spec.small_model is not SmallModel.NONE)
    assert (settings.averaging is not None) == (PartKind.ADAPTER_DELTA in spec.uploads)
    assert (settings.kept_classes is not None) == (PartKind.LOGITS in spec.uploads)
    assert (settings.trained_llm_lora is not None) == spec.trains_llm
    assert (settings.server_steps is not None) == (spec.public_set is not PublicSet.NOWHERE)


def test_the_page_of_strategies_says_what_each_lets_cross_the_network() -> None:
    page = (Path(__file__).parents[2] / "docs" / "strategies.md").read_text(encoding="utf-8")
    rows = {cells[1].strip("` "): cells for line in page.splitlines() if len(cells := line.split("|")) == 8}
    assert rows.keys() - {"strategy", "---"} == {spec.name for spec in BUILT_IN}
    for spec in BUILT_IN:
        _, _, small_model, sent, fetched, public, llm, _ = rows[spec.name]
        assert f"\n## {spec.name}\n" in page
        assert ("delta of θ" in sent) == (PartKind.ADAPTER_DELTA in spec.uploads)
        assert ("logits" in sent) == (PartKind.LOGITS in spec.uploads or MessageKind.SLM_LOGITS in spec.messages_up)
        assert ("tokenizer" in sent) == (PartKind.SLM_VOCABULARY in spec.uploads)
        assert ("tokenizer" in fetched) == (DownloadKind.LLM_VOCABULARY in spec.downloads)
        for kind, word in ((MessageKind.COUNTS, "counts"), (MessageKind.SLM_FEATURES, "features")):
            assert (word in sent) == (kind in spec.messages_up)
        told = (
            (MessageKind.LLM_LOGITS, "logits"),
            (MessageKind.CANDIDATES, "candidates"),
            (MessageKind.LLM_FEATURES, "feat"),
        )
        for kind, word in told:
            assert (word in fetched) == (kind in spec.messages_down)
        assert ("θ" in fetched) == (DownloadKind.ADAPTER in spec.downloads)
        assert ("manifest" in fetched) == (DownloadKind.MODEL_MANIFEST in spec.downloads)
        assert ("the proxy once" in fetched) == (DownloadKind.PROXY_BASE in spec.downloads)
        assert ("probe set" in fetched) == (DownloadKind.PROBE_SET in spec.downloads)
        assert ("devices' own" in small_model) == (spec.small_model is SmallModel.DEVICES_OWN)
        assert ("server trains" in public) == (spec.public_set is not PublicSet.NOWHERE)
        assert ("trained" in llm) == spec.trains_llm
        assert ("simulated only" in sent) == (not spec.deployable)


def test_only_what_leaves_private_rows_where_they_are_can_be_deployed() -> None:
    assert {name for name, spec in STRATEGIES.items() if spec.private_rows is not PrivateRows.OWN} == {"centralized"}
    assert {name for name, spec in STRATEGIES.items() if not spec.deployable} == {"centralized"}
    run = {"name": "a", "rounds": 1, "strategy": {"name": "centralized"}}
    with pytest.raises(ValidationError, match="exists in simulations and cannot be deployed"):
        RunCreate.model_validate(run)


def test_the_services_ask_the_settings_and_not_which_strategy_it_is() -> None:
    settings = CoPlmsSettings.model_validate(
        {"proxy_lora": {"rank": 4}, "llm_lora": {"rank": 5}, "top_k": 6, "min_coverage": 0.7}
    )
    assert (settings.shared_lora.rank, settings.trained_llm_lora.rank) == (4, 5)
    assert (settings.kept_classes, settings.least_coverage) == (6, 0.7)
    assert settings.assigned_rank(2) is None
    declared = CoPlmsSettings(device_ranks="declared", aggregation="exact_svd")
    assert [declared.assigned_rank(most) for most in (None, 3, 8, 9)] == [None, 3, None, None]
    alone = StandaloneSettings()
    assert (alone.shared_lora, alone.averaging, alone.server_steps, alone.kept_classes) == (None, None, None, None)
    assert alone.assigned_rank(2) is None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"steps": "module"}, "`steps` as `module:name`"),
        ({"uploads": frozenset({PartKind.LOGITS})}, "where devices upload an adapter_delta, and only there"),
        ({"settings": StandaloneSettings}, "where devices upload an adapter_delta, and only there"),
        ({"small_model": SmallModel.NONE}, "a `small_model` for the adapter whose delta devices upload"),
        ({"small_model": SmallModel.DEVICES_OWN}, "proxy_base where the small model is a distilled proxy"),
        ({"downloads": STRATEGIES["co_plms"].downloads | {DownloadKind.MODEL_MANIFEST}}, "model_manifest where"),
        ({"public_set": PublicSet.SERVER}, "probe_set where devices get public rows"),
        ({"settings": StrategySettings}, "settings with a default `name`"),
        ({"messages_up": frozenset({MessageKind.LLM_LOGITS})}, "one that is a part of an update"),
        ({"messages_up": frozenset({MessageKind.COUNTS, MessageKind.SLM_LOGITS})}, "at most one kind of `messages_up`"),
        ({"messages_down": frozenset({MessageKind.COUNTS})}, "one that is no part of an update"),
        ({"uploads": STRATEGIES["co_plms"].uploads | {PartKind.COUNTS}}, "in `messages_up` and not in `uploads`"),
        ({"last_step": True}, "`messages_down` where a `last_step` learns"),
    ],
)
def test_a_spec_that_contradicts_itself_is_refused(changes: dict[str, object], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        replace(STRATEGIES["co_plms"], **changes)


def test_a_distribution_adds_a_strategy_by_an_entry_point(importable: Path) -> None:
    install(importable, "quiet_strategy", PLUGIN)
    found = collect([entry("quiet_strategy:SPEC")])
    assert sorted(found) == sorted([*STRATEGIES, "quiet"])
    assert found["quiet"].settings().name == "quiet"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("no_such_module:SPEC", "a module that can be imported, got ModuleNotFoundError: No module named"),
        ("quiet_strategy:NOTHING", "a module that can be imported, got AttributeError"),
        ("quiet_strategy:PartKind", "AttributeError"),
        ("quiet_strategy:QuietSettings", "a StrategySpec, got ModelMetaclass"),
        ("quiet_strategy:SAME_NAME", "a name that no other strategy has, got 'co_plms'"),
    ],
)
def test_what_is_no_strategy_is_named_with_its_entry_point(importable: Path, value: str, expected: str) -> None:
    install(importable, "quiet_strategy", PLUGIN)
    with pytest.raises(StrategyNotUsable, match=expected) as caught:
        collect([entry(value)])
    assert str(caught.value).startswith(f"entry point theirs = {value} of cotune.strategies: expected ")


STARTED = """
import json, sys
from protocol.runs import RunCreate
run = RunCreate.model_validate({"name": "a", "rounds": 1, "strategy": {"name": "quiet", "training": {"steps": 3}}})
schema = json.dumps(RunCreate.model_json_schema())
print(json.dumps([type(run.strategy).__name__, run.strategy.training.steps, "QuietSettings" in schema,
                  "torch" in sys.modules, RunCreate.model_validate_json(run.model_dump_json()) == run]))
"""


def test_a_process_knows_the_installed_strategies_from_its_start(tmp_path: Path) -> None:
    install(tmp_path, "quiet_strategy", PLUGIN, "quiet_strategy:SPEC")
    answer = run_with(tmp_path, STARTED)
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout) == ["QuietSettings", 3, True, False, True]


def test_a_strategy_that_imports_torch_at_once_is_refused(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("")  # stands for the real one, which takes seconds to import
    install(tmp_path, "quiet_strategy", f"import torch\n{PLUGIN}", "quiet_strategy:SPEC")
    answer = run_with(tmp_path, "import protocol.strategies")
    assert answer.returncode == 1
    assert "expected a module that imports torch in its steps only: the API has none; it did at once" in answer.stderr


def run_with(folder: Path, code: str) -> "subprocess.CompletedProcess[str]":
    services = Path(__file__).parents[2] / "services"
    return subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": f"{folder}:{services}"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_run_of_an_unknown_strategy_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"'unheard_of' .* does not match any of the expected tags"):
        RunCreate.model_validate({"name": "a", "rounds": 1, "strategy": {"name": "unheard_of"}})
