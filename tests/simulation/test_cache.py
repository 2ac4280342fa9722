import hashlib
import json
from pathlib import Path

import pytest

from simulation.cache import ResultCache, configuration_hash
from simulation.errors import CacheError
from simulation.run_results import RunKey
from tests.simulation.made_up_runs import made_up_run

CONFIGURATION = {"rounds": 2, "data": {"sha256": "ab"}}
KEYS = [RunKey(strategy=strategy, seed=seed) for strategy in ("alone", "together") for seed in (0, 1)]


def test_an_interrupted_benchmark_goes_on(tmp_path: Path) -> None:
    first = ResultCache(tmp_path, CONFIGURATION)
    assert first.missing(KEYS) == KEYS
    result = made_up_run("together", 0, 40.0)
    first.write(result)
    again = ResultCache(tmp_path, dict(reversed(CONFIGURATION.items())))
    assert again.missing(KEYS) == [KEYS[0], KEYS[1], KEYS[3]]
    assert again.read(KEYS[2]) == result


def test_another_configuration_seed_checkpoint_or_strategy_is_another_run(tmp_path: Path) -> None:
    ResultCache(tmp_path, CONFIGURATION).write(made_up_run("together", 0, 40.0))
    assert ResultCache(tmp_path, {"rounds": 3, "data": {"sha256": "ab"}}).missing(KEYS) == KEYS
    found = ResultCache(tmp_path, CONFIGURATION)
    for key in (KEYS[3], KEYS[0], RunKey(strategy="together", seed=0, checkpoint="1")):
        assert found.read(key) is None


def test_results_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = ResultCache(tmp_path, CONFIGURATION)
    old = made_up_run("alone", 0, 40.0)
    found.write(old)

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no space"):
        found.write(made_up_run("alone", 0, 50.0))
    assert found.read(KEYS[0]) == old
    assert [each.name for each in found.path(KEYS[0]).parent.iterdir()] == [found.path(KEYS[0]).name]


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_torn_file_is_refused_and_left(tmp_path: Path, share: float) -> None:
    found = ResultCache(tmp_path, CONFIGURATION)
    found.write(made_up_run("alone", 0, 40.0))
    path = found.path(KEYS[0])
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    for read in (lambda: found.read(KEYS[0]), lambda: found.missing(KEYS)):
        with pytest.raises(CacheError, match=r"alone-seed0-0\.json: expected a whole JSON file, .* remove the file"):
            read()
    assert path.exists()


def damaged(held: dict, change: str) -> object:
    if change == "value":
        held["result"]["scores"]["phone"]["web"]["rouge_l"][0] += 1
    elif change == "configuration":
        held["configuration"] = "0" * 64
    elif change == "format":
        held["format"] = "cotune-run-result/0"
    elif change == "surplus":
        held["more"] = 1
    elif change == "list":
        return [held]
    else:
        held["result"]["own"] = {"phone": "law"}
        text = json.dumps(held["result"], sort_keys=True, separators=(",", ":"))
        held["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    return held


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("value", "the SHA-256 that the file names"),
        ("configuration", r"expected configuration .*, got 0{64}"),
        ("format", "format 'cotune-run-result/1', got 'cotune-run-result/0'"),
        ("surplus", "expected fields configuration, format, result, sha256, got configuration, format, more"),
        ("list", "format 'cotune-run-result/1', got 'list'"),
        ("no_result", "a result of a run, got 1 faults"),
    ],
)
def test_a_damaged_or_foreign_file_is_refused(tmp_path: Path, change: str, message: str) -> None:
    found = ResultCache(tmp_path, CONFIGURATION)
    found.write(made_up_run("alone", 0, 40.0))
    path = found.path(KEYS[0])
    path.write_text(json.dumps(damaged(json.loads(path.read_bytes()), change)))
    with pytest.raises(CacheError, match=message):
        found.read(KEYS[0])


def test_the_result_of_another_run_under_a_runs_name_is_refused(tmp_path: Path) -> None:
    found = ResultCache(tmp_path, CONFIGURATION)
    found.write(made_up_run("alone", 1, 40.0))
    found.path(KEYS[1]).rename(found.path(KEYS[0]))
    with pytest.raises(CacheError, match="expected the run alone, seed 0, checkpoint 0, got alone, seed 1"):
        found.read(KEYS[0])


def test_a_folder_in_place_of_a_file_is_told(tmp_path: Path) -> None:
    found = ResultCache(tmp_path, CONFIGURATION)
    found.path(KEYS[0]).mkdir(parents=True)
    with pytest.raises(CacheError, match="expected a readable file"):
        found.read(KEYS[0])


@pytest.mark.parametrize("value", [{1, 2}, float("nan"), object()], ids=["set", "nan", "object"])
def test_a_configuration_is_json(value: object) -> None:
    with pytest.raises(CacheError, match="values that JSON holds"):
        configuration_hash({"value": value})
