"""What `docs/method.md` names exists: modules, functions and the tests that hold each formula."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SERVICES = ROOT / "services"
METHOD = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
INDEX = [
    [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    for line in METHOD.partition("| formula | code | source | test |")[2].partition("\n\n")[0].splitlines()[2:]
]
QUOTED = re.findall(r"`([^`\n]+)`", METHOD)


@cache
def defined(path: Path) -> frozenset[str]:
    """Top-level functions and classes of a file."""
    nodes = ast.parse(path.read_text(encoding="utf-8")).body
    return frozenset(node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef))


@pytest.mark.parametrize("row", INDEX, ids=[row[1].strip("`") for row in INDEX])
def test_every_formula_has_its_code_and_its_test(row: list[str]) -> None:
    formula, code, _, test = row
    assert formula
    module, _, name = code.strip("`").rpartition(".")
    assert name in defined(SERVICES / (module.replace(".", "/") + ".py"))
    file, _, name = test.strip("`").partition("::")
    assert name in defined(ROOT / "tests" / "cotuning" / file)


def test_every_matching_of_the_method_is_in_the_index() -> None:
    assert len(INDEX) > 25
    for name in ("uld", "gold", "mined_dtw", "alm"):
        assert any(row[0].startswith(f"`{name}`") for row in INDEX), name


@pytest.mark.parametrize("name", sorted({name for name in QUOTED if re.fullmatch(r"[\w/]+(\.py|/)", name)}))
def test_every_file_that_is_named_exists(name: str) -> None:
    whole = [ROOT / name, SERVICES / name]
    assert any(path.exists() for path in whole) or list(SERVICES.rglob(name)), name
