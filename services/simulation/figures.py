"""The figures of a quality report, as PNG and SVG files that depend on the report alone: equal reports, equal bytes.

Needs matplotlib (the extra `bench`). Figures are made without pyplot: no global state, no display.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

from assets.atomic import write_atomically
from simulation.errors import SimulationError
from simulation.report import QualityReport, Summary
from simulation.scores import METRIC_NAMES, METRICS, Metric, sign

FORMATS = ("png", "svg")
_DOTS_PER_INCH = 120
_COLOURS: Mapping[str, str] = {
    "method": "#0072b2",
    "baseline": "#999999",
    "control": "#e69f00",
    "ablation": "#56b4e9",
    "bound": "#009e73",
    "before": "#cccccc",
}
"""By kind; of the palette of Okabe and Ito, which colour-blind readers can tell apart."""
_MARKERS = "osD^vP*Xd<>hp8"

_SETTINGS: Mapping[str, Any] = {"svg.hashsalt": "cotune", "svg.fonttype": "path", "font.size": 9.0}


class NoFigures(SimulationError):
    """matplotlib is not installed."""


def write_figures(
    report: QualityReport, folder: Path, *, metrics: Sequence[Metric] = METRICS, formats: Sequence[str] = FORMATS
) -> list[Path]:
    """Draw everything that the report has data for.

    Files: `bars_<metric>`, `rounds_<metric>`, `bytes_<metric>`, `transfer_<strategy>_<metric>` for the method.

    Args:
        report: what to draw.
        folder: made if need be; files of these names are replaced.
        metrics: which to draw.
        formats: some of `FORMATS`.

    Returns:
        The files, in the order in which they were written.

    Raises:
        NoFigures: matplotlib is not installed.
        OSError: the folder cannot be written.
    """
    drawn: dict[str, Callable[[], Any]] = {}
    for metric in metrics:
        drawn[f"bars_{metric}"] = partial(bars, report, metric)
        if any(metric in point.scores for each in report.strategies for point in each.curve):
            drawn[f"rounds_{metric}"] = partial(by_round, report, metric)
            drawn[f"bytes_{metric}"] = partial(against_bytes, report, metric)
        for each in report.strategies:
            if each.entry.kind == "method" and any(value is not None for row in each.transfer[metric] for value in row):
                drawn[f"transfer_{each.entry.name}_{metric}"] = partial(transfer_map, report, each, metric)
    written = []
    for name, draw in drawn.items():
        with _drawing():
            figure = draw()
            for kind in formats:
                path = folder / f"{name}.{kind}"
                metadata = {"Date": None} if kind == "svg" else {"Software": None}
                content = BytesIO()
                figure.savefig(content, format=kind, dpi=_DOTS_PER_INCH, metadata=metadata)
                write_atomically(path, content.getvalue())
                written.append(path)
    return written


def bars(report: QualityReport, metric: Metric) -> Any:
    """A bar a strategy, the mean of the devices, with its interval."""
    figure, axes = _axes(width=max(4.0, 0.55 * len(report.strategies) + 1.5))
    for place, each in enumerate(report.strategies):
        found = each.devices[metric]
        value = found.value if found.value is not None else 0.0
        axes.bar(place, value, color=_COLOURS[each.entry.kind], width=0.7)
        if found.low is not None and found.high is not None:
            reach = [[max(0.0, value - found.low)], [max(0.0, found.high - value)]]
            axes.errorbar(place, value, yerr=reach, color="black", capsize=3, linewidth=1)
    names = [each.entry.name for each in report.strategies]
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right")
    axes.set_ylabel(_label(metric))
    axes.set_title("Mean of the devices, own test rows, 95 % intervals")
    return figure


def by_round(report: QualityReport, metric: Metric) -> Any:
    """A line a strategy: validation scores after each round."""
    figure = _curves(report, metric, lambda point: float(point.round), "round", "Validation, mean of the devices")
    figure.axes[0].xaxis.get_major_locator().set_params(integer=True)
    return figure


def against_bytes(report: QualityReport, metric: Metric) -> Any:
    """A line a strategy: validation scores against what had crossed the network for a device by then."""
    label = "bytes a device, up and down, MB"
    return _curves(report, metric, lambda point: point.bytes_per_device / 1e6, label, "Quality against bytes")


def transfer_map(report: QualityReport, summary: Summary, metric: Metric) -> Any:
    """A heat map: the model of each device on each set of rows."""
    import numpy as np

    values = np.array([[np.nan if each is None else each for each in row] for row in summary.transfer[metric]])
    figure, axes = _axes(width=1.0 * len(report.sets) + 2.5, height=0.5 * len(report.devices) + 2.0)
    # The colours always say the same: bright is good.
    colours = "viridis_r" if metric == "bits_per_byte" else "viridis"
    image = axes.imshow(np.ma.masked_invalid(values), cmap=colours, aspect="auto")
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for row, column in zip(*np.nonzero(np.isfinite(values)), strict=True):
        text = f"{values[row, column]:.{2 if metric == 'bits_per_byte' else 1}f}"
        shade = "black" if sign(metric) * (values[row, column] - middle) > 0 else "white"
        axes.text(column, row, text, ha="center", va="center", color=shade, fontweight="bold", fontsize=8)
    axes.set_xticks(range(len(report.sets)), report.sets, rotation=40, ha="right")
    axes.set_yticks(range(len(report.devices)), [each.name for each in report.devices])
    axes.set_xlabel("test rows of")
    axes.set_ylabel("model of")
    axes.set_title(f"{summary.entry.name}: {METRIC_NAMES[metric]}")
    figure.colorbar(image, ax=axes)
    return figure


def _curves(report: QualityReport, metric: Metric, place: Callable[[Any], float], label: str, title: str) -> Any:
    figure, axes = _axes(width=6.5)
    for index, each in enumerate(report.strategies):
        points = [point for point in each.curve if metric in point.scores]
        if points:
            axes.plot(
                [place(point) for point in points],
                [point.scores[metric] for point in points],
                marker=_MARKERS[index % len(_MARKERS)],
                color=_COLOURS[each.entry.kind],
                label=each.entry.name,
            )
    axes.set_xlabel(label)
    axes.set_ylabel(_label(metric))
    axes.set_title(title)
    axes.legend(fontsize=7)
    return figure


def _label(metric: Metric) -> str:
    return f"{METRIC_NAMES[metric]}{' (less is better)' if metric == 'bits_per_byte' else ''}"


def _axes(*, width: float, height: float = 4.0) -> tuple[Any, Any]:
    figure = _matplotlib().figure.Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


@contextmanager
def _drawing() -> Iterator[None]:
    """matplotlib's own defaults and ours, whatever a user's matplotlibrc says."""
    matplotlib = _matplotlib()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        yield


def _matplotlib() -> Any:
    try:
        import matplotlib.figure
    except ImportError:
        raise NoFigures("expected matplotlib, which is not installed: pip install 'cotune[bench]'") from None
    return matplotlib
