"""`cotune simulate`: strategies compared in one process, without a network."""

import shlex
import sys
import time
import warnings
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
            report = _report(config, data, seeds, folder, shown)
        _write(report, out)
        _print(console(), report, out)


def _report(config: Path, data: Path, seeds: int, folder: Path, shown: View) -> "QualityReport":
    # Late: they import torch.
    from transformers.utils.logging import disable_progress_bar

    from assets.errors import AssetError
    from simulation.base_models import BaseModels
    from simulation.errors import RoundFailed, SimulationError
    from simulation.reporting import report_of
    from simulation.settings import read_settings
    from simulation.setup import set_up

    disable_progress_bar()
    # Of names that the library itself will change; they would tear the picture of the progress.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
    try:
        settings = read_settings(config)
        shown.step(f"Looking at the data in {data}")
        experiment = set_up(settings, data, range(settings.first_seed, settings.first_seed + seeds))
        start = time.monotonic()
        models = BaseModels(settings.llm_loading)
        gates = _gates(experiment, folder, models, shown)
        runs = _play(experiment, folder, models, shown)
        shown.step("Intervals of the differences")
        return report_of(
            experiment,
            runs,
            command=shlex.join(["cotune", *sys.argv[1:]]),
            gates=gates,
            seconds=time.monotonic() - start,
        )
    except RoundFailed as error:
        raise RunFailed(
            str(error), next_step="results of the other runs are kept; correct it and start again"
        ) from None
    except (SimulationError, AssetError) as error:
        raise BadInput(str(error)) from None


def _gates(experiment: "Experiment", folder: Path, models: "BaseModels", shown: View) -> list["Gate"]:
    """What is checked before anything trains; what fails is told at once, and in the report."""
    from simulation.experiment import Listener
    from simulation.gate_checks import check_gates
    from simulation.reporting import public_gate

    if experiment.left_out:
        shown.say(f"left out: {experiment.left_out} public rows that hold a private, validation or test row")
    public = public_gate(experiment)
    gates = [public] if public is not None else []
    if experiment.settings.gates:
        shown.step("Gates before training")
        gates += check_gates(experiment, folder, models, Listener(on_progress=shown.progress))
    for gate in gates:
        shown.say(f"{gate.name}: {gate.measured}" + ("" if gate.passed else f"; FAILED: {gate.without_it}"))
    return gates


def _play(experiment: "Experiment", folder: Path, models: "BaseModels", shown: View) -> list["RunResult"]:
    from simulation.experiment import Listener, missing_runs, run_experiment

    total = len(experiment.devices) * (1 + len(experiment.settings.strategies))
    missing = len(missing_runs(experiment, folder))
    shown.say(f"{total} runs, {missing} to play, {total - missing} there already, in {folder}")
    started = 0

    def on_run(key: "RunKey", found: bool) -> None:
        nonlocal started
        started += 1
        shown.step(f"Run {started} of {total}: {key}{' (there already)' if found else ''}")

    return run_experiment(experiment, folder, Listener(on_run, shown.progress), models)


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
