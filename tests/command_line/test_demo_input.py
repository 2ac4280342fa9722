"""What `cotune demo` says about input that it cannot use, before it starts anything."""

import json
from pathlib import Path

import pytest

from command_line.demo_data import generated_data, given_data, write_mix
from command_line.errors import BadInput
from command_line.exit_codes import ExitCode
from tests.command_line.conftest import Cotune


def data_folder(path: Path, *domains: str) -> Path:
    row = json.dumps({"id": "1", "instruction": "a", "input": "", "output": "b"}) + "\n"
    for domain in domains:
        (path / domain).mkdir(parents=True)
        for split in ("train", "validation", "test"):
            (path / domain / f"{split}.jsonl").write_text(row * 5)
    (path / "public.jsonl").write_text(row)
    return path


def test_a_given_folder(tmp_path: Path) -> None:
    data = given_data(data_folder(tmp_path, "a", "b", "c"), ["c", "a"])
    assert data.domains == ("c", "a")
    assert data.split("a", "test").is_file()
    write_mix(data, tmp_path / "mix.jsonl", rows_a_domain=3)
    assert len((tmp_path / "mix.jsonl").read_text().splitlines()) == 6


def test_the_generated_folder_has_the_same_shape(tmp_path: Path) -> None:
    data = generated_data(tmp_path / "data")
    assert len(data.domains) >= 3
    again = given_data(data.folder, data.domains)
    assert (again.domains, again.public) == (data.domains, data.public)


def test_missing_files_are_named_all_at_once(tmp_path: Path) -> None:
    data_folder(tmp_path, "a")
    (tmp_path / "public.jsonl").unlink()
    with pytest.raises(BadInput) as caught:
        given_data(tmp_path, ["a", "b"])
    for name in ("public.jsonl", "b/train.jsonl", "b/test.jsonl"):
        assert str(tmp_path / name) in caught.value.message
    assert "domains there: a" in (caught.value.next_step or "")


def test_no_domain_and_repeated_domains(tmp_path: Path) -> None:
    data_folder(tmp_path, "a", "b")
    with pytest.raises(BadInput) as caught:
        given_data(tmp_path, [])
    assert "choose from: a, b" in (caught.value.next_step or "")
    with pytest.raises(BadInput, match="more than once"):
        given_data(tmp_path, ["a", "a"])


def test_a_broken_line_is_named_with_file_and_line(tmp_path: Path) -> None:
    data = given_data(data_folder(tmp_path, "a"), ["a"])
    path = data.split("a", "test")
    path.write_text('{"id": "1"}\n{"id": \n')
    with pytest.raises(BadInput, match=f"{path}, line 2"):
        write_mix(data, tmp_path / "mix.jsonl", rows_a_domain=3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "/no/such/folder", "--domains", "a"], "/no/such/folder"),
        (["--domains", "a"], "together with --data"),
        (["--out", "/proc/no/demo.json"], "--out"),
        (["--out", "/"], "expected --out to be a file"),
    ],
)
def test_wrong_options(run_cotune: Cotune, arguments: list[str], said: str) -> None:
    ended = run_cotune("demo", *arguments)
    assert ended.code == ExitCode.BAD_INPUT
    assert said in ended.err


def test_a_cache_that_cannot_be_written(run_cotune: Cotune, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COTUNE_CACHE", str(tmp_path / "file"))
    ended = run_cotune("demo", "--out", str(tmp_path / "demo.json"))
    assert ended.code == ExitCode.BAD_INPUT
    assert "the cache folder" in ended.err
    assert "COTUNE_CACHE" in ended.err
