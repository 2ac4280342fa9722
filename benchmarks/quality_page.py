"""The page of the benchmark of quality: what was compared, how, on what, and the report of each setting."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from benchmarks.measuring import facts
from benchmarks.quality_settings import Preset
from command_line.base_model_recipes import ModelRecipe
from command_line.output import seconds_text
from protocol.strategies import STRATEGIES
from simulation.markdown import markdown
from simulation.report import QualityReport

_WHERE = {
    "heterogeneous": "Small models of several architectures and tokenizers, dealt to the devices in turn.",
    "homogeneous": "One small model on every device: what federated averaging of it needs.",
}


@dataclass(frozen=True)
class Built:
    """A base model: how it was to be made, and what came of it.

    Attributes:
        recipe: its part of the recipe.
        summary: of its folder: parameters, tokens, bits per byte.
    """

    recipe: ModelRecipe
    summary: Mapping[str, Any]


@dataclass(frozen=True)
class Made:
    """The base models, and what they did not read.

    Attributes:
        models: of the first set.
        documents: of the corpus that were left out.
        rows: of the pool.
    """

    models: Sequence[Built]
    documents: int
    rows: int


def page(
    preset: Preset,
    reports: Mapping[str, QualityReport],
    made: Made,
    figures: Mapping[str, Sequence[str]],
    *,
    command: str,
    seconds: float,
) -> str:
    """The page as Markdown.

    Args:
        preset: the size.
        reports: by setting.
        made: the base models.
        figures: by setting: addresses from the page.
        command: that makes it again.
        seconds: that it took this time.
    """
    parts = [
        f"# Quality, {preset.name}",
        f"`{command}` wrote this page. It took {seconds_text(seconds)} this time, without what was kept from before. "
        f"All runs together took {seconds_text(_processor_seconds(reports))} of processor time.",
        _shapes(preset, reports),
        _models(made),
        _parameters(reports),
        f"**How they were chosen.** {' '.join(preset.size.chosen.split())} Test rows were read once, by the runs "
        "below, and decided nothing.",
        *(_setting(name, report, figures[name]) for name, report in reports.items()),
    ]
    return "\n\n".join(parts) + "\n"


def _shapes(preset: Preset, reports: Mapping[str, QualityReport]) -> str:
    first = next(iter(reports.values()))
    settings, machine = first.configuration["settings"], facts()
    hidden = ", ".join(settings["public"]["leave_out_domains"]) or "none"
    left_out = "; ".join(f"{count} {why}" for why, count in first.facts["public rows left out"].items()) or "none"
    memory = psutil.virtual_memory().total / 1e9
    evaluation = settings["evaluation"]
    lines = [
        f"{len(first.devices)} devices; their domains: {', '.join(dict.fromkeys(_domains(first)))}. Only devices hold: "
        f"{hidden}.",
        f"Public rows left out: {left_out}.",
        f"{settings['rounds']} rounds, {settings['probe_rows']} probe rows; {evaluation['test_rows']} test rows a "
        f"device, at most {evaluation['max_new_tokens']} new tokens, greedy.",
        f"Seeds {settings['first_seed']} to {settings['first_seed'] + preset.size.seeds - 1}; sets of base models: "
        f"{len(preset.size.base_seeds)} (seed {', '.join(map(str, preset.size.base_seeds))}).",
        f"{machine['processor']}, {machine['cores']} cores, {memory:.0f} GB, {machine['system']}; python "
        f"{machine['python']}, " + ", ".join(f"{name} {number}" for name, number in machine["packages"].items()) + ".",
    ]
    return "\n".join(["## What was compared, on what", "", *(f"- {each}" for each in lines)])


def _domains(report: QualityReport) -> list[str]:
    return [domain for device in report.devices for domain in device.mixture]


def _processor_seconds(reports: Mapping[str, QualityReport]) -> float:
    found = [each for report in reports.values() for each in report.strategies]
    return sum(each.runs * sum(each.cost.cpu_seconds.values()) for each in found)


def _models(made: Made) -> str:
    columns = [
        "model",
        "architecture",
        "layers x width",
        "vocabulary",
        "parameters",
        "tokens read",
        "text",
        "responses",
    ]
    rows = []
    for each in made.models:
        recipe, summary = each.recipe, each.summary
        last = summary["measurements"][-1] if summary["measurements"] else {}
        rows.append(
            [
                recipe.name,
                recipe.architecture,
                f"{recipe.layers} x {recipe.hidden_size}",
                f"{recipe.tokenizer}, {recipe.vocab_size}",
                f"{summary['parameters'] / 1e6:.2f} M",
                f"{summary['tokens']:,}",
                *(f"{last[kind]:.3f}" if last.get(kind) is not None else "-" for kind in ("text", "responses")),
            ]
        )
    left_out = (
        f"Not read: {made.documents:,} documents and {made.rows:,} rows that hold a row of the devices, or are told "
        "to be of a domain that only devices hold."
    )
    title = "## Base models, bits per byte on what was held out"
    return "\n".join([title, "", *_table(columns, rows), "", left_out])


def _parameters(reports: Mapping[str, QualityReport]) -> str:
    """What of each strategy's settings is not its default; ablations and controls: what they have other than this."""
    rows = {}
    for report in reports.values():
        for entry in report.configuration["settings"]["strategies"]:
            own = entry["settings"]
            usual = STRATEGIES[own["name"]].settings.model_validate({}).model_dump(mode="json")
            found = _differences(own, usual)
            if entry["proxy"] is not None:
                found["proxy"] = {name: entry["proxy"][name] for name in ("source", "steps")}
            rows[entry["label"]] = [entry["label"], own["name"], f"`{json.dumps(found)}`"]
    columns = ["strategy", "is", "other than its defaults"]
    proxy = next(iter(reports.values())).configuration["settings"]["proxy"]
    return "\n".join(
        [
            "## Hyper-parameters",
            "",
            f"The proxy: {proxy['source']}, {proxy['steps']} distillation steps of {proxy['batch_size']} rows, "
            f"learning rate {proxy['learning_rate']:g}, weight {proxy['distillation_weight']:g}.",
            "",
            *_table(columns, rows.values()),
        ]
    )


def _differences(own: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in own.items():
        if isinstance(value, dict) and isinstance(usual.get(name), dict):
            if inner := _differences(value, usual[name]):
                found[name] = inner
        elif value != usual.get(name):
            found[name] = value
    return found


def _setting(name: str, report: QualityReport, figures: Sequence[str]) -> str:
    """The report with its headings one level deeper."""
    head, _, rest = markdown(report, figures=figures).partition("\n")
    # Its own command is that of the page.
    rest = rest.replace(f"`{report.command}`\n\n", "", 1)
    deeper = re.sub(r"^#", "##", rest, flags=re.MULTILINE)
    del head
    return f"## {name.capitalize()}\n\n{_WHERE[name]}\n{deeper.rstrip()}"


def _table(columns: Sequence[str], rows: Any) -> list[str]:
    lines = ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns), *lines]
