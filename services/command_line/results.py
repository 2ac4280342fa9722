"""What a demo measured, as `results/demo.json` holds it."""

import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from protocol.devices import Device
from protocol.events import Event, EventType
from protocol.runs import AlignmentMetrics, DeviceMetrics, ModelVersion, Round, Scores, Traffic
from protocol.statuses import AssignmentStatus, RoundStatus, RunStatus

STAGE_OF: dict[str, str] = {
    RunStatus.PENDING: "wait_for_worker",
    RunStatus.PREPARING: "prepare_proxy",
    RoundStatus.OPEN: "devices",
    RoundStatus.COLLECTING: "devices",
    RoundStatus.AGGREGATING: "aggregate",
    RoundStatus.CO_TUNING: "co_tune_llm",
    RoundStatus.EVALUATING: "evaluate",
}
"""The status that a run or a round was in -> the stage that its seconds count for."""


class _Result(BaseModel):
    model_config = ConfigDict(frozen=True)


class DeviceResult(_Result):
    """One device's model: what it is and how good it was."""

    name: str
    architecture: str
    tokenizer: str
    parameters: int
    domain: str
    before: Scores
    standalone: Scores
    co_tuned: Scores
    training_rows: int


class CloudResult(_Result):
    """The LLM or the proxy, on the mix of domains."""

    before: Scores
    co_tuned: Scores
    architecture: str
    parameters: int
    tokenizer: str


class SentInstead(_Result):
    """Bytes that would have crossed the network, up and down together, had whole models been exchanged each round."""

    slm_weights: int
    llm_weights: int


class DemoResults(_Result):
    """Everything that the demo measured. The first nine keys are stable."""

    rounds: int
    seconds: float
    seconds_by_stage: dict[str, float]
    devices: list[DeviceResult]
    llm: CloudResult
    proxy: CloudResult
    bytes: dict[str, dict[str, int]] = Field(description="`up` and `down`: kind -> bytes of the co-tuning run.")
    alignment: dict[str, float]
    instead: SentInstead
    device_seconds_by_stage: dict[str, float] = Field(description="Mean of the devices, seconds, all rounds.")
    peak_memory_bytes: dict[str, int] = Field(description="Largest resident memory of each process.")
    cpu_seconds: dict[str, float] = Field(description="Processor seconds of each process of the demo.")
    promoted_version: int
    updates_counted: int
    restarts: int = Field(description="Processes that died and were started again.")
    seed: int
    data: str = Field(description="`generated`, or the folder that was given.")


def counted_metrics(rounds: Iterable[Round]) -> dict[str, list[DeviceMetrics]]:
    """Return the metrics of the counted updates by device, in the order of the rounds."""
    found: dict[str, list[DeviceMetrics]] = {}
    for each in rounds:
        for device in each.devices:
            if device.status is AssignmentStatus.COUNTED:
                found.setdefault(device.device_id, []).append(DeviceMetrics.model_validate(device.metrics))
    return found


def device_results(
    devices: Sequence[Device], standalone: Sequence[Round], co_tuning: Sequence[Round]
) -> list[DeviceResult]:
    """Put together what each device reported in both runs.

    Raises:
        ValueError: a device lacks one of the three measurements; names the device and what is missing.
    """
    alone, together = counted_metrics(standalone), counted_metrics(co_tuning)
    results = []
    for device in devices:
        first, last = alone.get(device.device_id, []), together.get(device.device_id, [])
        befores = [each.before for each in (*first, *last) if each.before]
        measured = {
            "before": befores[0] if befores else None,
            "standalone": first[-1].after if first else None,
            "co_tuned": last[-1].after if last else None,
        }
        profile = device.profile
        found = {name: scores for name, scores in measured.items() if scores is not None}
        if missing := measured.keys() - found.keys():
            raise ValueError(f"device {device.name}: expected scores before and after both runs, got no {missing}")
        results.append(
            DeviceResult(
                name=device.name,
                architecture=profile.model_architecture,
                tokenizer=profile.tokenizer_kind,
                parameters=profile.model_parameters,
                domain=profile.domain or device.name,
                training_rows=profile.num_examples,
                **found,
            )
        )
    return results


def cloud_scores(versions: Sequence[ModelVersion], model: str) -> tuple[Scores, Scores, int]:
    """Return the test scores of `llm` or `proxy` before the first round and after the last, and the latter's version.

    Raises:
        ValueError: one of them was not measured.
    """
    measured = [each for each in versions if model in each.metrics.get("test", {})]
    if len(measured) < 2 or measured[0].number != 0:
        numbers = [each.number for each in measured]
        raise ValueError(f"expected test scores of the {model} in version 0 and after the last round, got {numbers}")
    first, last = measured[0], measured[-1]
    scores = [Scores.model_validate(each.metrics["test"][model]) for each in (first, last)]
    return scores[0], scores[1], last.number


def mean_alignment(rounds: Iterable[Round]) -> dict[str, float]:
    """Return coverage and class agreement over every counted update, weighted by spans."""
    metrics = [each.alignment for several in counted_metrics(rounds).values() for each in several if each.alignment]
    spans = sum(each.num_spans for each in metrics)

    def mean(values: Iterable[tuple[float, AlignmentMetrics]]) -> float:
        return sum(value * each.num_spans for value, each in values) / spans if spans else 0.0

    return {
        "coverage": mean((each.coverage, each) for each in metrics),
        "class_agreement": mean((each.class_agreement, each) for each in metrics),
    }


def mean_device_seconds(rounds: Iterable[Round]) -> dict[str, float]:
    """Return the seconds by stage that the mean device spent over all rounds."""
    totals: dict[str, float] = {}
    by_device = counted_metrics(rounds)
    for several in by_device.values():
        for each in several:
            for stage, seconds in each.seconds_by_stage.items():
                totals[stage] = totals.get(stage, 0.0) + seconds
    return {stage: seconds / len(by_device) for stage, seconds in totals.items()}


def seconds_between(events: Sequence[Event]) -> float:
    """Return the seconds from the first of a run's events to the last."""
    return (events[-1].time - events[0].time).total_seconds() if events else 0.0


def stage_seconds(events: Sequence[Event]) -> dict[str, float]:
    """Return the seconds that a run and its rounds spent in each status, from the events that say they left it."""
    totals: dict[str, float] = {}
    entered: dict[str | None, datetime] = {None: events[0].time} if events else {}
    for event in events:
        if event.type is EventType.ROUND_OPENED:
            entered[event.round_id] = event.time
        elif event.type in (EventType.ROUND_STATUS_CHANGED, EventType.RUN_STATUS_CHANGED):
            place = event.round_id if event.type is EventType.ROUND_STATUS_CHANGED else None
            stage = STAGE_OF.get(str(event.data.get("from")))
            if stage and place in entered:
                totals[stage] = totals.get(stage, 0.0) + (event.time - entered[place]).total_seconds()
            entered[place] = event.time
    return totals


def bytes_by_kind(traffic: Traffic) -> dict[str, dict[str, int]]:
    """Return the bytes of a run by direction and kind; the kinds of an upload are always there."""
    up = {"adapter_delta": 0, "logits": 0, "metrics": 0} | traffic.up
    return {"up": up, "down": dict(traffic.down)}


def write(results: DemoResults, path: Path) -> None:
    """Write the results, whole or not at all. Raises OSError if the folder cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data: dict[str, Any] = results.model_dump(mode="json")
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        file.write(json.dumps(data, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
