"""The rules of the house that a machine can check."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SERVICES = ROOT / "services"
FORBIDDEN_NAMES = {"utils", "util", "common", "shared", "helpers", "helper", "manager", "core", "misc", "models"}


def source_files() -> list[Path]:
    return sorted(path for path in SERVICES.rglob("*.py") if "egg-info" not in str(path))


def trees() -> Iterator[tuple[Path, ast.Module]]:
    for path in source_files():
        yield path.relative_to(ROOT), ast.parse(path.read_text(encoding="utf-8"), str(path))


def test_import_rules_are_kept() -> None:
    program = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([program, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_no_module_is_called_by_a_word_that_says_nothing() -> None:
    # `assets.models` loads and saves model folders; nothing else is called so.
    allowed = {SERVICES / "assets" / "models.py"}
    named = [path for path in source_files() if path.stem in FORBIDDEN_NAMES or path.parent.name in FORBIDDEN_NAMES]
    assert [path for path in named if path not in allowed] == []


@pytest.mark.parametrize("module", ["pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"])
def test_no_pickle(module: str) -> None:
    importers = [path for path, tree in trees() if module in imported_modules(tree)]
    assert importers == []


def test_torch_load_is_not_used() -> None:
    """`torch.load` reads pickles."""
    callers = [str(path) for path, tree in trees() for call in calls(tree) if call in ("torch.load", "torch.save")]
    assert callers == []


def test_no_endless_loop_that_only_sleeps() -> None:
    """A loop waits with an event that can end it, or asks a question each time; never `while True: ... sleep`."""
    found = []
    for path, tree in trees():
        for node in ast.walk(tree):
            endless = isinstance(node, ast.While) and isinstance(node.test, ast.Constant) and bool(node.test.value)
            if endless and any(call in ("time.sleep", "sleep") for call in calls(node)):
                found.append(f"{path}:{node.lineno}")
    assert found == []


def test_no_unfinished_work_is_marked() -> None:
    words = ("TO" + "DO", "FIX" + "ME", "X" * 3)
    marked = [str(path) for path in source_files() if any(word in path.read_text(encoding="utf-8") for word in words)]
    assert marked == []


def test_functions_and_files_keep_their_size() -> None:
    """Functions of at most 50 lines, files of at most 400."""
    long_files = {str(path): lines for path in source_files() if (lines := len(path.read_text().splitlines())) > 400}
    long_functions = {
        f"{path}:{node.name}": length
        for path, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (length := code_lines(node)) > 50
    }
    assert long_files == {}
    assert long_functions == {}


STARTED = """
import sys
from {module} import *
import {module}
heavy = sorted({{"torch", "transformers", "peft", "safetensors"}} & {{name.partition(".")[0] for name in sys.modules}})
print(",".join(heavy))
"""


@pytest.mark.parametrize(
    "module",
    ["cloud_api.__main__", "command_line.main", "protocol.runs", "persistence.database", "edge_agent.__main__"],
)
def test_no_torch_is_loaded_although_it_is_installed(module: str) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("COTUNE_")}
    result = subprocess.run(
        [sys.executable, "-c", STARTED.format(module=module)],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == ""


def imported_modules(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.partition(".")[0])
    return names


def calls(tree: ast.AST) -> list[str]:
    return [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def code_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function's body without its docstring and signature: what a reader must hold in mind."""
    body = node.body[1:] if ast.get_docstring(node) else node.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
