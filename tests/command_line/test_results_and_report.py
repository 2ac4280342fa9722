"""From what the API tells to `results/demo.json` and to the words at the end."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from command_line.report import print_report, traffic_lines, verdict
from command_line.results import (
    CloudResult,
    DemoResults,
    SentInstead,
    bytes_by_kind,
    cloud_scores,
    counted_metrics,
    device_results,
    mean_alignment,
    mean_device_seconds,
    stage_seconds,
    write,
)
from protocol.events import EventType
from protocol.runs import AlignmentMetrics, DeviceMetrics, Traffic
from protocol.statuses import AssignmentStatus
from tests.command_line.sample_results import a_round, a_version, an_event, device, round_device, scores, traffic


def metrics(**parts: object) -> dict[str, object]:
    return DeviceMetrics.model_validate(parts).model_dump(mode="json")


def results(standalone: float = 40, co_tuned: float = 60) -> DemoResults:
    alone = [a_round(1, [round_device("phone", metrics=metrics(before=scores(5), after=scores(standalone)))])]
    together = [a_round(1, [round_device("phone", metrics=metrics(before=scores(5), after=scores(co_tuned)))])]
    return DemoResults(
        rounds=1,
        seconds=61.0,
        seconds_by_stage={"base_models": 1.0},
        devices=device_results([device("phone")], alone, together),
        llm=CloudResult(
            before=scores(50), co_tuned=scores(51), architecture="llama", parameters=10**6, tokenizer="BPE"
        ),
        proxy=CloudResult(
            before=scores(30), co_tuned=scores(31), architecture="llama", parameters=10**5, tokenizer="BPE"
        ),
        bytes=bytes_by_kind(traffic()),
        alignment={"coverage": 1.0, "class_agreement": 0.9},
        instead=SentInstead(slm_weights=80_000_000, llm_weights=800_000_000),
        device_seconds_by_stage={"mutual_learning": 10.0},
        peak_memory_bytes={"worker": 500_000_000},
        cpu_seconds={"worker": 30.0, "phone": 20.0},
        promoted_version=1,
        updates_counted=1,
        restarts=0,
        seed=0,
        data="generated",
    )


def test_only_counted_updates_count() -> None:
    rejected = round_device("tablet", AssignmentStatus.REJECTED, metrics(after=scores(99)))
    found = counted_metrics([a_round(1, [round_device("phone", metrics=metrics(after=scores(1))), rejected])])
    assert list(found) == ["id-phone"]


def test_a_device_without_a_measurement_is_named() -> None:
    with pytest.raises(ValueError, match=r"phone.*standalone"):
        device_results([device("phone")], [], [a_round(1, [round_device("phone", metrics=metrics(before=scores(1)))])])


def test_cloud_scores_are_those_of_the_first_and_the_last_measured_version() -> None:
    versions = [a_version(0, {"llm": scores(10)}), a_version(1, {}), a_version(2, {"llm": scores(20)})]
    before, after, number = cloud_scores(versions, "llm")
    assert (before.exact_match, after.exact_match, number) == (10, 20, 2)
    with pytest.raises(ValueError, match="proxy"):
        cloud_scores(versions, "proxy")


def test_alignment_is_weighted_by_spans() -> None:
    def aligned(coverage: float, spans: int) -> dict[str, object]:
        alignment = AlignmentMetrics(coverage=coverage, class_agreement=0.5, num_spans=spans, skipped_rows=0)
        return metrics(alignment=alignment)

    rounds = [a_round(1, [round_device("a", metrics=aligned(1.0, 300)), round_device("b", metrics=aligned(0.6, 100))])]
    assert mean_alignment(rounds) == {"coverage": pytest.approx(0.9), "class_agreement": pytest.approx(0.5)}
    assert mean_alignment([]) == {"coverage": 0.0, "class_agreement": 0.0}


def test_device_seconds_are_the_mean_over_devices_of_the_sum_over_rounds() -> None:
    rounds = [
        a_round(number, [round_device(name, metrics=metrics(seconds_by_stage={"train": 2.0})) for name in "ab"])
        for number in (1, 2)
    ]
    assert mean_device_seconds(rounds) == {"train": 4.0}


def test_stage_seconds_come_from_the_events() -> None:
    changed, run_changed = EventType.ROUND_STATUS_CHANGED, EventType.RUN_STATUS_CHANGED
    events = [
        an_event(1, EventType.RUN_CREATED, 0),
        an_event(2, run_changed, 1, **{"from": "pending", "to": "preparing"}),
        an_event(3, run_changed, 11, **{"from": "preparing", "to": "running"}),
        an_event(4, EventType.ROUND_OPENED, 11, "r1"),
        an_event(5, changed, 12, "r1", **{"from": "open", "to": "collecting"}),
        an_event(6, changed, 20, "r1", **{"from": "collecting", "to": "aggregating"}),
        an_event(7, changed, 21, "r1", **{"from": "aggregating", "to": "co_tuning"}),
        an_event(8, changed, 26, "r1", **{"from": "co_tuning", "to": "evaluating"}),
        an_event(9, EventType.ROUND_OPENED, 27, "r2"),
        an_event(10, changed, 28, "r1", **{"from": "evaluating", "to": "published"}),
        an_event(11, changed, 30, "r2", **{"from": "open", "to": "collecting"}),
    ]
    assert stage_seconds(events) == {
        "wait_for_worker": 1.0, "prepare_proxy": 10.0, "devices": 12.0, "aggregate": 1.0, "co_tune_llm": 5.0,
        "evaluate": 2.0,
    }  # fmt: skip


def test_every_kind_of_upload_is_in_the_bytes() -> None:
    assert bytes_by_kind(Traffic(up={}, down={}))["up"] == {"adapter_delta": 0, "logits": 0, "metrics": 0}


def test_the_file_has_the_keys_that_the_readers_know(tmp_path: Path) -> None:
    path = tmp_path / "results" / "demo.json"
    write(results(), path)
    data = json.loads(path.read_text())
    assert {"rounds", "seconds", "seconds_by_stage", "devices", "llm", "proxy", "bytes", "alignment"} <= set(data)
    device_keys = {
        "name", "architecture", "tokenizer", "parameters", "domain", "before", "standalone", "co_tuned",
    }  # fmt: skip
    assert device_keys <= set(data["devices"][0])
    assert {"rouge_l", "exact_match", "bits_per_byte"} <= set(data["devices"][0]["co_tuned"])
    assert {"before", "co_tuned"} <= set(data["llm"])
    assert {"adapter_delta", "logits", "metrics"} <= set(data["bytes"]["up"])
    assert {"coverage", "class_agreement"} <= set(data["alignment"])
    assert list(path.parent.iterdir()) == [path]


def test_the_words_are_no_stronger_than_the_rows() -> None:
    weak, strong = "\n".join(verdict(results(40, 42))), "\n".join(verdict(results(40, 60)))
    assert "phone, co-tuned against standalone: +2.0 points on 150 rows" in weak
    assert weak.count("no difference that these rows can show") == 4
    assert strong.count("no difference that these rows can show") == 2
    assert ": higher" in strong
    assert ": lower" in "\n".join(verdict(results(60, 20)))


def test_the_bytes_are_set_against_whole_models() -> None:
    text = " ".join(traffic_lines(results()))
    assert "In all 8.0 MB" in text
    assert "80.0 MB (9.9 times as much)" in text
    assert "800.0 MB (99.5 times as much)" in text


def test_the_report_shows_every_model_and_fits_a_hundred_and_twenty_columns(capsys: pytest.CaptureFixture[str]) -> None:
    print_report(Console(width=120, highlight=False), results())
    text = capsys.readouterr().out
    for word in ("phone", "gpt2", "0.70 M", "LLM", "proxy", "40.0", "60.0", "150", "adapter_delta", "Peak memory"):
        assert word in text
    tables = text.partition("What these rows")[0]
    assert max(len(line) for line in tables.splitlines()) <= 120
