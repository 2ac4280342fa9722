"""The documents name what there is: files, links, settings, commands, targets of the Makefile."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import typer

from cloud_api.security import Rates
from cloud_api.settings import Settings as ApiSettings
from command_line.main import app
from edge_agent.__main__ import app as agent
from protocol.statuses import PartKind
from worker.settings import Settings as WorkerSettings

ROOT = Path(__file__).parents[2]
SERVICES = ROOT / "services"
PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")
GUIDE = (ROOT / "docs" / "operator_guide.md").read_text(encoding="utf-8")
INTERNAL = {"COTUNE_SUPERVISOR"}
"""Set by our own processes for each other."""


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    linked = {(ROOT / "docs" / link).resolve() for link in re.findall(r"\]\(([^)]+)\)", index)}
    assert {page for page in PAGES if page != ROOT / "docs" / "README.md"} <= linked


def settings_of_the_code() -> set[str]:
    texts = [path.read_text() for path in [*SERVICES.rglob("*.py"), *SERVICES.rglob("*.sh")]]
    found = {name for text in texts for name in re.findall(r"\bCOTUNE_[A-Z0-9_]+[A-Z0-9]\b(?!_|\{)", text)} - INTERNAL
    parts = {f"COTUNE_MAX_{kind.name}_BYTES" for kind in PartKind}
    return found | parts | {f"COTUNE_RATE_{each.name.upper()}" for each in fields(Rates)}


def test_every_setting_is_in_the_operators_guide_and_no_other() -> None:
    section = GUIDE.partition("\n## 10. Settings\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"`(COTUNE_[A-Z0-9_]+)`", section)) == settings_of_the_code()


def test_every_variable_that_a_page_names_is_one_of_the_code_or_of_the_deployment() -> None:
    deployment = "".join((ROOT / name).read_text() for name in (".env.example", "docker-compose.yml", "Makefile"))
    known = settings_of_the_code() | set(re.findall(r"COTUNE_[A-Z0-9_]+", deployment))
    for page in PAGES:
        named = set(re.findall(r"`\$?(COTUNE_[A-Z0-9_]+)[=`]", page.read_text(encoding="utf-8")))
        assert named <= known, page.name


def commands_of(program: typer.Typer, prefix: str) -> set[str]:
    found = set()
    for command in program.registered_commands:
        assert command.callback is not None
        found.add(f"{prefix} {command.name or command.callback.__name__.replace('_', '-')}")
    for group in program.registered_groups:
        assert group.typer_instance is not None
        found |= commands_of(group.typer_instance, f"{prefix} {group.name}")
    return found


def test_the_readme_names_every_command_and_no_other() -> None:
    section = README.partition("\n## Commands\n")[2].partition("\n\nEvery command")[0]
    groups = {"cotune-agent", *(f"cotune {group.name}" for group in app.registered_groups)}
    named = set()
    for first, second in re.findall(r"^\| (`cotune.*?) \| (.*) \|$", section, re.MULTILINE):
        program, *alone = re.findall(r"`([^`]+)`", first)
        followed = re.findall(r"`([^`]+)`", second)
        if program in groups:
            named |= {f"{program} {each}" for each in followed}
        else:
            named |= {program, *(f"cotune {each}" for each in alone)}
    assert named == commands_of(app, "cotune") | commands_of(agent, "cotune-agent")


def test_every_target_that_a_page_names_is_in_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.search(r"\.PHONY: ((?:.|\\\n)*?)\n\n", makefile)[1].replace("\\\n", " ").split())  # type: ignore[index]
    for page in PAGES:
        for named in re.findall(r"`make ([\w -]+)", page.read_text(encoding="utf-8")):
            assert {each for each in named.split() if "=" not in each and each.islower()} <= targets, (page.name, named)


def test_every_module_of_the_page_on_the_code_is_there() -> None:
    page = (ROOT / "docs" / "code.md").read_text(encoding="utf-8")
    modules = {path.name for folder in (SERVICES, ROOT / "tests") for path in folder.rglob("*.py")}
    named = set(re.findall(r"\b(\w+\.py)\b", page))
    assert len(named) > 30
    assert named <= modules
    folders = {path.name for path in SERVICES.rglob("*") if path.is_dir()}
    assert set(re.findall(r"^ +(\w+)/ ", page, re.MULTILINE)) <= folders


def test_the_limits_of_the_page_on_security_are_the_defaults() -> None:
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| `([A-Z]+)` \| .* \| ([\d.]+/\d+) \|$", page, re.MULTILINE))
    rates = Rates()
    assert told == {
        each.name.upper(): f"{getattr(rates, each.name).per_second:g}/{getattr(rates, each.name).burst}"
        for each in fields(rates)
    }


def test_the_defaults_in_the_operators_guide_are_those_of_the_code(tmp_path: Path) -> None:
    environment = {"COTUNE_HOME": str(tmp_path)}
    api, worker = ApiSettings.from_environment(environment), WorkerSettings.from_environment(environment)
    rows = dict(
        re.findall(r"^\| `(COTUNE_[A-Z_]+)`(?:, `COTUNE_[A-Z_]+`)* \| (\d+)(?:: never)? \|", GUIDE, re.MULTILINE)
    )
    assert {name: int(value) for name, value in rows.items()} == {
        "COTUNE_API_PROCESSES": api.processes,
        "COTUNE_MAX_ADAPTER_DELTA_BYTES": api.upload_limits[PartKind.ADAPTER_DELTA],
        "COTUNE_UPLOAD_CHUNK_BYTES": api.upload_chunk_bytes,
        "COTUNE_LINK_SECONDS": api.link_seconds,
        "COTUNE_LEASE_SECONDS": worker.lease_seconds,
        "COTUNE_STALL_SECONDS": worker.stall_seconds,
        "COTUNE_LONG_CALL_SECONDS": worker.long_call_seconds,
        "COTUNE_SWEEP_SECONDS": worker.sweep_seconds,
        "COTUNE_RESEND_AFTER_SECONDS": worker.resend_after_seconds,
        "COTUNE_OFFLINE_AFTER_SECONDS": worker.offline_after_seconds,
        "COTUNE_ORPHAN_SWEEP_SECONDS": worker.orphan_sweep_seconds,
        "COTUNE_ORPHAN_GRACE_SECONDS": worker.orphan_grace_seconds,
    }
