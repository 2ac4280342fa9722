"""A report of made-up runs, for the tests of what is shown of it."""

from collections.abc import Mapping
from typing import Any

from simulation.gates import Gate
from simulation.report import DeviceFacts, Entry, QualityReport, build_report
from simulation.targets import Wanted
from tests.simulation.made_up_runs import NUM_ROWS, made_up_run

ENTRIES = (
    Entry(name="before", kind="before", about="the base models"),
    Entry(name="standalone", kind="baseline", about="each device alone"),
    Entry(name="fedcollm", kind="baseline", about="a peer"),
    Entry(name="co_plms", kind="method", about="ours"),
    Entry(name="uninformed_proxy", kind="control", about="a proxy that knows nothing"),
    Entry(name="llm_public", kind="control", about="the LLM on public rows"),
)
LEVELS = {
    "before": 20.0,
    "standalone": 40.0,
    "fedcollm": 42.0,
    "co_plms": 50.0,
    "uninformed_proxy": 44.0,
    "llm_public": 20.0,
}
LLM_LEVELS = {"co_plms": 66.0}
MEGABYTES = {"before": 0, "standalone": 0, "llm_public": 0, "fedcollm": 2}
WANTED = Wanted(hidden_sets=("units",), full_model_bytes=200_000_000.0)


def gate(name: str, passed: bool) -> Gate:
    return Gate(
        name=name,
        passed=passed,
        required="something",
        measured="a figure",
        figures={"figure": 1.0},
        without_it="nothing can be said",
    )


def made_up_report(
    levels: Mapping[str, float] = LEVELS, *, wanted: Wanted = WANTED, seeds: int = 3, **changes: Any
) -> QualityReport:
    """Two devices, six strategies; `changes` replace arguments of `build_report`."""
    runs = [
        made_up_run(
            each.name,
            seed,
            levels[each.name],
            llm_level=LLM_LEVELS.get(each.name, 60.0),
            megabytes=MEGABYTES.get(each.name, 1),
        )
        for each in ENTRIES
        for seed in range(seeds)
    ]
    arguments: dict[str, Any] = {
        "title": "Quality",
        "command": "make bench-quality",
        "configuration": {"rounds": 2},
        "facts": {"cores": 2},
        "devices": [
            DeviceFacts(name=name, mixture={domain: 100}, test_rows=NUM_ROWS, architecture="GPT-2", parameters=10**6)
            for name, domain in (("phone", "web"), ("laptop", "units"))
        ],
        "entries": ENTRIES,
        "runs": runs,
        "gates": [gate("LLM leads", True)],
        "wanted": wanted,
        "draws": 400,
    }
    return build_report(**arguments | changes)
