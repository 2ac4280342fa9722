import json
from collections import Counter
from pathlib import Path

import pytest

from assets.errors import DataFileError
from cotuning.examples import Example
from simulation.errors import SetupError
from simulation.partition import DomainRows, dirichlet_mixtures, one_domain_each, read_domains

SIZES = {"train": 30, "validation": 6, "test": 12}


def rows(name: str, split: str) -> tuple[Example, ...]:
    return tuple(Example(f"{name}-{split}-{number}", "Say it.", "", str(number)) for number in range(SIZES[split]))


def domains(*names: str) -> dict[str, DomainRows]:
    return {name: DomainRows(name, *(rows(name, split) for split in SIZES)) for name in names}


def write_folder(folder: Path, *names: str) -> Path:
    for name in names:
        for split in SIZES:
            path = folder / name / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = [
                {"id": each.id, "instruction": each.instruction, "input": "", "output": each.output}
                for each in rows(name, split)
            ]
            path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    return folder


def test_domains_are_read_with_all_accepted_answers(tmp_path: Path) -> None:
    write_folder(tmp_path, "code", "math")
    references = {"id": "math-test-3", "references": ["3", "three"]}
    (tmp_path / "extra_references.jsonl").write_text(json.dumps(references) + "\n")
    found = read_domains(tmp_path, ["math"])
    assert list(found) == ["math"]
    assert [len(each) for each in (found["math"].train, found["math"].validation, found["math"].test)] == [30, 6, 12]
    assert found["math"].test[3].accepted == ("3", "three")
    assert list(read_domains(tmp_path)) == ["code", "math"]


def test_a_limit_takes_the_same_rows_each_time_in_their_order_and_not_just_the_first(tmp_path: Path) -> None:
    write_folder(tmp_path, "code", "math")
    found = read_domains(tmp_path, test_rows=5)["code"].test
    assert found == read_domains(tmp_path, ["code"], test_rows=5)["code"].test
    places = [int(each.id.rpartition("-")[2]) for each in found]
    assert places == sorted(places)
    assert places != list(range(5))
    assert len(read_domains(tmp_path, test_rows=99)["code"].test) == 12


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        ("", {"names": ["law"]}, "expected domains among code, math; got law"),
        ("missing", {}, r"train, validation, test\.jsonl of every domain; missing: .*math/validation\.jsonl"),
        ("empty", {}, r"at least one row in every split, got none in .*math/validation\.jsonl"),
        ("", {"test_rows": 0}, r"limits of at least 1 row, got \{'test': 0\}"),
    ],
    ids=["unknown", "missing", "empty", "limit"],
)
def test_bad_folders_are_refused(tmp_path: Path, spoil: str, options: dict, message: str) -> None:
    write_folder(tmp_path, "code", "math")
    if spoil:
        path = tmp_path / "math" / "validation.jsonl"
        path.unlink()
        if spoil == "empty":
            path.touch()
    with pytest.raises(SetupError, match=message):
        read_domains(tmp_path, **options)


def test_a_broken_row_names_its_line(tmp_path: Path) -> None:
    write_folder(tmp_path, "code")
    with open(tmp_path / "code" / "train.jsonl", "a") as file:
        file.write("{\n")
    with pytest.raises(DataFileError, match=r"train\.jsonl:31"):
        read_domains(tmp_path)


def test_one_domain_a_device() -> None:
    found = one_domain_each(domains("code", "math"), ["math", "code"], sizes=[7, 9], seed=1)
    assert [each.name for each in found] == ["math", "code"]
    assert [each.mixture for each in found] == [{"math": 7}, {"code": 9}]
    assert [len(set(each.train)) for each in found] == [7, 9]
    assert {row.id.partition("-")[0] for row in found[0].train} == {"math"}
    assert found[0].test == domains("math")["math"].test
    assert found[0].test_set == found[0].domain == "math"


def test_devices_of_one_domain_share_its_test_rows_and_no_training_row() -> None:
    first, second, other = one_domain_each(domains("code", "math"), ["code", "code", "math"], seed=0)
    assert [first.name, second.name, other.name] == ["code-1", "code-2", "math"]
    assert first.test_set == second.test_set == "code"
    assert len(first.train) == len(second.train) == 15
    assert len(other.train) == 30
    assert set(first.train) | set(second.train) == set(rows("code", "train"))


def test_a_draw_follows_from_its_seed() -> None:
    def draw(seed: int) -> list[object]:
        held = domains("code", "math", "law")
        alone = one_domain_each(held, ["code", "math"], sizes=5, seed=seed)
        how = {"alpha": 0.5, "size": 20, "validation_size": 4, "test_size": 8}
        return [*alone, *dirichlet_mixtures(held, 3, **how, seed=seed)]

    assert draw(3) == draw(3)
    assert all(first != second for first, second in zip(draw(3), draw(4), strict=True))


def test_a_device_that_is_added_leaves_the_rows_of_the_others() -> None:
    held = domains("code", "math", "law")
    two = one_domain_each(held, ["code", "math"], sizes=5, seed=2)
    assert one_domain_each(held, ["code", "math", "law"], sizes=5, seed=2)[:2] == two


@pytest.mark.parametrize(
    ("placed", "sizes", "message"),
    [
        (["code"], None, "at least 2 devices, got 1"),
        ([], None, "at least 2 devices, got 0"),
        (["code", "law"], None, "domains among code, math; got law"),
        (["code", "math"], [3], "a size for each of 2 devices, got 1"),
        (["code", "math"], [3, 0], r"sizes of at least 1 row, got \[0\]"),
        (["code", "math"], 31, "suffice for: code has 30, asked for are 31, math has 30, asked for are 31"),
        (["code", "code", "math"], [16, 15, 1], "suffice for: code has 30, asked for are 31"),
    ],
)
def test_what_the_data_does_not_allow_is_refused(placed: list[str], sizes: object, message: str) -> None:
    with pytest.raises(SetupError, match=message):
        one_domain_each(domains("code", "math"), placed, sizes=sizes, seed=0)  # type: ignore[arg-type]


def test_mixtures_add_up_and_share_no_row() -> None:
    held = domains("code", "math", "law")
    found = dirichlet_mixtures(held, 4, alpha=0.3, size=20, validation_size=4, test_size=9, seed=5)
    assert [each.name for each in found] == ["device-1", "device-2", "device-3", "device-4"]
    assert [each.test_set for each in found] == [each.name for each in found]
    for split, size in (("train", 20), ("validation", 4), ("test", 9)):
        every = [row for each in found for row in getattr(each, split)]
        assert len(every) == len(set(every)) == 4 * size
    for each in found:
        counted = Counter(row.id.partition("-")[0] for row in each.train)
        assert dict(each.mixture) == dict(counted)
        assert list(each.mixture.values()) == sorted(each.mixture.values(), reverse=True)
        assert each.domain == next(iter(each.mixture))


def test_all_rows_can_be_dealt_even_when_a_domain_runs_out() -> None:
    held = domains("code", "math", "law")
    found = dirichlet_mixtures(held, 3, alpha=1e-3, size=30, validation_size=6, test_size=12, seed=1)
    assert {row for each in found for row in each.train} == {row for each in held.values() for row in each.train}


def test_alpha_says_how_mixed_the_devices_are() -> None:
    held = domains("code", "math", "law")

    def largest_share(alpha: float) -> float:
        shares = []
        for seed in range(40):
            found = dirichlet_mixtures(held, 2, alpha=alpha, size=15, validation_size=1, test_size=1, seed=seed)
            shares.append(max(found[0].mixture.values()) / 15)
        return sum(shares) / len(shares)

    assert largest_share(0.05) > 0.9
    assert largest_share(100.0) < 0.45


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_devices": 1}, "at least 2 devices, got 1"),
        ({"alpha": 0.0}, "a finite alpha above 0, got 0.0"),
        ({"alpha": float("nan")}, "a finite alpha above 0, got nan"),
        ({"size": 31}, "between 1 and 30 train rows a device, since the domains have 60 for 2 devices; got 31"),
        ({"test_size": 13}, "between 1 and 12 test rows a device"),
        ({"validation_size": 0}, "between 1 and 6 validation rows a device"),
    ],
    ids=["devices", "alpha", "nan", "size", "test", "validation"],
)
def test_mixtures_that_the_data_does_not_allow_are_refused(change: dict, message: str) -> None:
    how = {"num_devices": 2, "alpha": 1.0, "size": 5, "validation_size": 2, "test_size": 2, "seed": 0} | change
    with pytest.raises(SetupError, match=message):
        dirichlet_mixtures(domains("code", "math"), **how)
    with pytest.raises(SetupError, match="at least 2 domains to mix, got code"):
        dirichlet_mixtures(domains("code"), 2, alpha=1.0, size=5, validation_size=2, test_size=2, seed=0)
