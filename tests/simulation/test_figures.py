import sys
from pathlib import Path

import pytest

from simulation.figures import NoFigures, against_bytes, bars, by_round, transfer_map, write_figures
from simulation.report import QualityReport
from tests.simulation.made_up_report import ENTRIES, made_up_report


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(NoFigures, match=r"expected matplotlib, which is not installed: pip install 'cotune\[bench\]'"):
        write_figures(made_up_report(), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture(autouse=True)
def _installed(request: pytest.FixtureRequest) -> None:
    if "without_matplotlib" not in request.node.name:
        pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install '.[bench]'")


def test_bars_are_the_means_with_their_intervals() -> None:
    report = made_up_report()
    axes = bars(report, "rouge_l").axes[0]
    expected = [each.devices["rouge_l"] for each in report.strategies]
    assert [bar.get_height() for bar in axes.patches] == [each.value for each in expected]
    assert [label.get_text() for label in axes.get_xticklabels()] == [each.name for each in ENTRIES]
    drawn = [(line.get_segments()[0][0][1], line.get_segments()[0][1][1]) for line in axes.collections]
    assert [low for low, _ in drawn] == pytest.approx([each.low for each in expected])
    assert [high for _, high in drawn] == pytest.approx([each.high for each in expected])


def test_lines_by_round_and_by_bytes() -> None:
    report = made_up_report()
    curve = report.summary("co_plms").curve
    for figure, places in (
        (by_round(report, "exact_match"), [0, 1, 2]),
        (against_bytes(report, "exact_match"), [2.5, 4.5, 6.5]),
    ):
        axes = figure.axes[0]
        lines = {line.get_label(): line for line in axes.lines}
        assert list(lines) == [each.name for each in ENTRIES]
        assert lines["co_plms"].get_xdata().tolist() == places
        assert lines["co_plms"].get_ydata().tolist() == [each.scores["exact_match"] for each in curve]
    assert against_bytes(report, "bits_per_byte").axes[0].get_ylabel() == "bits per byte (less is better)"


def test_the_heat_map_has_each_device_on_each_set() -> None:
    report = made_up_report()
    summary = report.summary("co_plms")
    axes = transfer_map(report, summary, "rouge_l").axes[0]
    values = summary.transfer["rouge_l"]
    assert axes.images[0].get_array().tolist() == [list(row) for row in values]
    assert [text.get_text() for text in axes.texts] == [f"{value:.1f}" for row in values for value in row]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["units", "web"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["phone", "laptop"]


def test_a_place_that_was_not_measured_stays_empty() -> None:
    report = made_up_report()
    summary = report.summary("co_plms")
    holes = summary.model_copy(update={"transfer": {"rouge_l": ((None, 50.0), (40.0, 30.0))}})
    axes = transfer_map(report, holes, "rouge_l").axes[0]
    assert [text.get_text() for text in axes.texts] == ["50.0", "40.0", "30.0"]
    assert axes.images[0].get_array().mask.tolist() == [[True, False], [False, False]]


def test_files_of_equal_reports_are_equal_byte_for_byte(tmp_path: Path) -> None:
    report = made_up_report()
    first, second = (write_figures(report, tmp_path / name, metrics=["bits_per_byte"]) for name in ("first", "second"))
    names = [f"{kind}_bits_per_byte" for kind in ("bars", "rounds", "bytes", "transfer_co_plms")]
    assert [each.name for each in first] == [f"{name}.{kind}" for name in names for kind in ("png", "svg")]
    for one, other in zip(first, second, strict=True):
        assert one.name == other.name
        content = one.read_bytes()
        assert content == other.read_bytes()
        assert content.startswith(b"\x89PNG" if one.suffix == ".png" else b"<?xml")


def test_a_users_own_settings_change_nothing_and_stay(tmp_path: Path) -> None:
    import matplotlib

    report = without_curves()
    expected = [each.read_bytes() for each in write_figures(report, tmp_path / "plain", metrics=["rouge_l"])]
    with matplotlib.rc_context({"font.size": 20.0, "svg.hashsalt": None}):
        found = [each.read_bytes() for each in write_figures(report, tmp_path / "own", metrics=["rouge_l"])]
        assert matplotlib.rcParams["font.size"] == 20.0
    assert found == expected


def test_without_curves_there_are_no_lines(tmp_path: Path) -> None:
    names = [each.name for each in write_figures(without_curves(), tmp_path, metrics=["rouge_l"])]
    assert names == [f"{name}_rouge_l.{kind}" for name in ("bars", "transfer_co_plms") for kind in ("png", "svg")]


def without_curves() -> QualityReport:
    report = made_up_report()
    strategies = tuple(each.model_copy(update={"curve": ()}) for each in report.strategies)
    return report.model_copy(update={"strategies": strategies})
