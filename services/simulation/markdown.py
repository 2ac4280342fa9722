"""A report of quality as Markdown: what failed or was missed first, in plain words, then the tables."""

from collections.abc import Iterable, Mapping, Sequence

from simulation.report import DeviceFacts, QualityReport, Summary
from simulation.scores import METRIC_NAMES, METRICS, Metric
from simulation.statistics import Interval
from simulation.targets import gain_text

_DIGITS: Mapping[Metric, int] = {"rouge_l": 1, "exact_match": 1, "bits_per_byte": 3}
_UNKNOWN = "-"


def markdown(report: QualityReport, *, figures: Sequence[str] = ()) -> str:
    """The whole page.

    Args:
        report: what to show.
        figures: addresses of the figures, as links from the page.
    """
    parts = [
        f"# {report.title}",
        f"`{report.command}`",
        "\n".join(f"- {line}" for line in verdict(report)),
        _section("Targets", ["measure", "required", "measured", "met"], _target_rows(report)),
        _section("Gates before training", ["gate", "required", "measured", "holds"], _gate_rows(report)),
        _section("Devices", ["device", "training rows", "test rows", "model"], map(_device_row, report.devices)),
        _quality(report),
        _section(
            "Gains of the method, relative, on the devices' own test rows",
            ["over", *(METRIC_NAMES[each] for each in METRICS)],
            _gain_rows(report),
        ),
        *_by_device(report),
        _cloud(report),
        _section(
            "Cost of a run (mean of the runs; memory: the largest)",
            [
                "strategy",
                "optimizer steps",
                "CPU s",
                "wall s",
                "peak MB",
                "bytes up",
                "bytes down",
                "bytes/device/round",
            ],
            map(_cost_row, report.strategies),
        ),
        *(_transfer(report, each) for each in report.strategies if each.entry.kind == "method"),
        _notes(report),
        "\n".join(f"![{address.rpartition('/')[2].partition('.')[0]}]({address})" for address in figures),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def verdict(report: QualityReport) -> list[str]:
    """What a reader must know before any figure: gates that failed, targets that were missed, runs that were few."""
    lines = [f"**Gate failed: {each.name}** ({each.measured}): {each.without_it}." for each in report.failed_gates]
    if not report.gates:
        lines.append("**No gate was checked**: no figure below is a claim about the method.")
    missed = [each for each in report.targets if each.met is False]
    lines += [f"**Target missed**: {each.measure}: {each.measured}; required: {each.required}." for each in missed]
    if unmeasured := [each.measure for each in report.targets if each.met is None]:
        lines.append(f"Not measured: {'; '.join(unmeasured)}.")
    if len(met := [each for each in report.targets if each.met]) == len(report.targets):
        lines.append(f"All {len(met)} targets are met.")
    if report.baselines_not_run:
        lines.append(
            f"Baselines not run: {', '.join(report.baselines_not_run)}. The best baseline is that of the others."
        )
    checkpoints, seeds = _levels(report)
    for level, count in (("base checkpoint", checkpoints), ("seed of each checkpoint", seeds)):
        if count == 1:
            lines.append(f"One {level}: no interval says what another one would change.")
    lines.append(
        f"Intervals are 95 %, paired, from {report.draws} bootstrap draws of test rows, seeds and base checkpoints "
        f"({len(report.runs)} runs a strategy), each by itself: nothing is corrected for looking at several."
    )
    return lines


def _levels(report: QualityReport) -> tuple[int, int]:
    """Base checkpoints, and seeds of the one with the fewest; (0, 0) where nothing was compared."""
    first = next(iter(report.comparisons), None)
    return (first.checkpoints, first.seeds) if first else (0, 0)


def _section(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(each.replace("|", "\\|") for each in row) + " |" for row in rows]
    if not lines:
        return ""
    return "\n".join([f"## {title}", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns), *lines])


def _target_rows(report: QualityReport) -> list[list[str]]:
    words = {True: "met", False: "**not met**", None: "not measured"}
    return [[each.measure, each.required, each.measured, words[each.met]] for each in report.targets]


def _gate_rows(report: QualityReport) -> list[list[str]]:
    return [[each.name, each.required, each.measured, "yes" if each.passed else "**NO**"] for each in report.gates]


def _device_row(device: DeviceFacts) -> list[str]:
    rows = ", ".join(f"{domain} {count}" for domain, count in device.mixture.items())
    model = ", ".join(each for each in (device.architecture, device.tokenizer) if each)
    size = f"{device.parameters / 1e6:.2f} M" if device.parameters else ""
    return [device.name, rows, str(device.test_rows), " ".join(each for each in (model, size) if each) or _UNKNOWN]


def _quality(report: QualityReport) -> str:
    rows = [
        [each.entry.name, each.entry.kind, each.entry.about, *(_interval(each.devices[m], m) for m in METRICS)]
        for each in report.strategies
    ]
    names = [METRIC_NAMES[each] for each in METRICS]
    return _section("Quality, mean of the devices", ["strategy", "kind", "what", *names], rows)


def _gain_rows(report: QualityReport) -> list[list[str]]:
    best = {(each.theirs, each.metric) for each in report.over_best}
    rows = []
    for name in dict.fromkeys(each.theirs for each in report.comparisons):
        found = {each.metric: each for each in report.comparisons if each.theirs == name}
        cells = [gain_text(found[m]) + (" (best baseline)" if (name, m) in best else "") for m in METRICS]
        rows.append([name, *cells])
    return rows


def _by_device(report: QualityReport) -> list[str]:
    """A table a metric: strategies in rows, devices in columns."""
    names = [each.name for each in report.devices]
    return [
        _section(
            f"{METRIC_NAMES[metric]} by device",
            ["strategy", *names],
            [
                [each.entry.name, *(_number(each.by_device[name][metric], metric) for name in names)]
                for each in report.strategies
            ],
        )
        for metric in METRICS
    ]


def _cloud(report: QualityReport) -> str:
    rows = [
        [each.entry.name, model, rows, *(_number(values[m], m) for m in METRICS)]
        for each in report.strategies
        for model, sets in each.cloud.items()
        for rows, values in sets.items()
    ]
    names = [METRIC_NAMES[each] for each in METRICS]
    return _section("LLM and proxy", ["strategy", "model", "rows", *names], rows)


def _cost_row(summary: Summary) -> list[str]:
    cost = summary.cost
    peak = max(cost.peak_memory_bytes.values(), default=0)
    each_round = cost.per_device_and_round
    return [
        summary.entry.name,
        f"{sum(cost.steps.values()):,.0f}",
        f"{sum(cost.cpu_seconds.values()):,.0f}",
        f"{sum(cost.wall_seconds.values()):,.0f}",
        f"{peak / 1e6:,.0f}",
        _kinds(cost.up),
        _kinds(cost.down),
        _UNKNOWN if each_round is None else f"{each_round:,.0f}",
    ]


def _kinds(found: Mapping[str, float]) -> str:
    return ", ".join(f"{kind} {count:,.0f}" for kind, count in found.items()) or "0"


def _transfer(report: QualityReport, summary: Summary) -> str:
    rows = [
        [device.name, *(_UNKNOWN if value is None else f"{value:.1f}" for value in values)]
        for device, values in zip(report.devices, summary.transfer["rouge_l"], strict=True)
    ]
    return _section(f"Transfer, {summary.entry.name}: Rouge-L of a device's model on", ["device", *report.sets], rows)


def _notes(report: QualityReport) -> str:
    of: dict[str, list[str]] = {}
    for each in report.strategies:
        for note in each.notes:
            of.setdefault(note, []).append(each.entry.name)
    lines = [f"- {', '.join(names)}: {note}" for note, names in of.items()]
    return "\n".join(["## Notes", "", *lines]) if lines else ""


def _interval(found: Interval, metric: Metric) -> str:
    if found.value is None:
        return _UNKNOWN
    if found.low is None or found.high is None:
        return _number(found.value, metric)
    return f"{_number(found.value, metric)} ({_number(found.low, metric)} to {_number(found.high, metric)})"


def _number(value: float, metric: Metric) -> str:
    return f"{value:.{_DIGITS[metric]}f}"
