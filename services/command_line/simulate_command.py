"""`cotune simulate`: strategies compared in one process, without a network."""

import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from command_line import folders
from command_line.errors import BadInput, RunFailed
from command_line.interruption import interruption
from command_line.live_view import View, view
from command_line.output import bytes_text, console, print_table, seconds_text

if TYPE_CHECKING:
    from simulation.base_models import BaseModels
    from simulation.gates import Gate
    from simulation.report import QualityReport, Summary
    from simulation.run_results import RunKey, RunResult
    from simulation.setup import Experiment


def simulate(
    *,
    config: Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="The experiment.", show_default=False)],
    data: Annotated[Path, typer.Option(help="A data folder: <domain>/{train,validation,test}.jsonl and public.jsonl.")],
    out: Annotated[Path, typer.Option(help="Where the report goes, as JSON; beside it the same as .md.")],
    seeds: Annotated[
        int, typer.Option(min=1, max=1000, help="Runs of each strategy, each with a seed of its own.")
    ] = 1,
    processes: Annotated[
        int, typer.Option(min=1, max=256, help="Runs played at the same time, each on the experiment's threads.")
    ] = 1,
    cache: Annotated[
        Path | None, typer.Option(help="Where results are kept; default: simulations under $COTUNE_CACHE.")
    ] = None,
) -> None:
    """Play devices, rounds and strategies in one process, and compare what they reach.

    The steps are a deployment's own: the same seed gives the same adapters. A result that is there already is not
    computed again, so an interrupted experiment goes on where it was.
    """
    with interruption():
        folder = folders.prepare(
            cache or folders.cache_folder() / "simulations",
            what="the folder of results",
            variable="--cache" if cache else "COTUNE_CACHE",
        )
        if out.is_dir():
            raise BadInput(f"expected --out to name a file, got the folder {out}")
        # Progress goes to standard error: standard output is the table.
        with view(Console(stderr=True, highlight=False, emoji=False)) as shown:
            report = _report(config, data, seeds, folder, shown, processes)
        _write(report, out)
        _print(console(), report, out)


def _report(  # noqa: PLR0917
    config: Path, data: Path, seeds: int, folder: Path, shown: View, processes: int
) -> "QualityReport":
    # Late: they import torch.
    from simulation.base_models import BaseModels, hush_transformers
    from simulation.reporting import report_of
    from simulation.settings import read_settings
    from simulation.setup import set_up

    hush_transformers()
    with told_as_command_errors():
        settings = read_settings(config)
        shown.step(f"Looking at the data in {data}")
        experiment = set_up(settings, data, range(settings.first_seed, settings.first_seed + seeds))
        start = time.monotonic()
        models = BaseModels(settings.llm_loading)
        gates = told_gates(experiment, folder, models, shown)
        runs = play(experiment, folder, models, shown, processes)
        shown.step("Intervals of the differences")
        return report_of(
            experiment,
            runs,
            command=shlex.join(["cotune", *sys.argv[1:]]),
            gates=gates,
            seconds=time.monotonic() - start,
        )


@contextmanager
def told_as_command_errors() -> Iterator[None]:
    """Tell what an experiment raises as a command does.

    Raises:
        RunFailed: a run could not be played; the results of the others are kept.
        BadInput: something cannot be used.
    """
    from assets.errors import AssetError
    from simulation.errors import RoundFailed, SimulationError

    try:
        yield
    except RoundFailed as error:
        raise RunFailed(
            str(error), next_step="results of the other runs are kept; correct it and start again"
        ) from None
    except (SimulationError, AssetError) as error:
        raise BadInput(str(error)) from None


def told_gates(experiment: "Experiment", folder: Path, models: "BaseModels", shown: View) -> list["Gate"]:
    """What is checked before anything trains; what fails is told at once, and in the report."""
    from simulation.gate_checks import check_gates
    from simulation.player import Listener
    from simulation.reporting import public_gate

    for why, count in experiment.left_out.items():
        shown.say(f"left out: {count} public rows {why}")
    public = public_gate(experiment)
    gates = [public] if public is not None else []
    if experiment.settings.gates:
        shown.step("Gates before training")
        gates += check_gates(experiment, folder, models, Listener(on_progress=shown.progress))
    for gate in gates:
        shown.say(f"{gate.name}: {gate.measured}" + ("" if gate.passed else f"; FAILED: {gate.without_it}"))
    return gates


def play(
    experiment: "Experiment", folder: Path, models: "BaseModels", shown: View, processes: int
) -> list["RunResult"]:
    """Play what is missing, and tell how far it is; see `simulation.experiment.run_experiment`."""
    from simulation.experiment import run_experiment
    from simulation.planned import missing_runs
    from simulation.player import Listener

    total = len(experiment.devices) * (1 + len(experiment.settings.strategies))
    missing = len(missing_runs(experiment, folder))
    shown.say(f"{total} runs, {missing} to play, {total - missing} there already, in {folder}")
    started, side_by_side = 0, processes > 1

    def on_run(key: "RunKey", found: bool) -> None:
        nonlocal started
        started += 1
        shown.step(f"Run {started} of {total}: {key}{' (there already)' if found else ''}")

    def on_end(key: "RunKey") -> None:
        if side_by_side:
            shown.say(f"{key}: done")

    def on_progress(what: str, done: int, total: int) -> None:
        # Lines of every part of every run would be thousands; a picture has room for what is under way.
        if not side_by_side or shown.console.is_terminal:
            shown.progress(what, done, total)

    return run_experiment(experiment, folder, Listener(on_run, on_end, on_progress), models, processes=processes)


def _write(report: "QualityReport", out: Path) -> None:
    from simulation.markdown import markdown
    from simulation.report import write_json

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(report, out)
        out.with_suffix(".md").write_text(markdown(report), encoding="utf-8")
    except OSError as error:
        raise BadInput(f"expected to write the report to {out}: {error.strerror or error}") from None


def _print(out_console: Console, report: "QualityReport", out: Path) -> None:
    columns = [
        "strategy",
        "#Rouge-L",
        "#exact match, %",
        "#bits/byte",
        "#bytes/device/round",
        "#time",
        "#peak memory",
    ]
    rows = [_row(each) for each in report.strategies]
    print_table(out_console, f"{report.title}: devices on their own test rows", columns, rows)
    out_console.print(f"Report: {out}, {out.with_suffix('.md')}", markup=False, soft_wrap=True)


def _row(summary: "Summary") -> list[str]:
    quality = [summary.devices[metric].value for metric in ("rouge_l", "exact_match", "bits_per_byte")]
    sent = summary.cost.per_device_and_round
    return [
        summary.entry.name,
        *("" if value is None else f"{value:.{digits}f}" for value, digits in zip(quality, (1, 1, 3), strict=True)),
        "" if sent is None else bytes_text(round(sent)),
        seconds_text(sum(summary.cost.wall_seconds.values())),
        bytes_text(max(summary.cost.peak_memory_bytes.values(), default=0)),
    ]
