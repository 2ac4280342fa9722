"""Runs as the API would tell of them, built from the wire schemas, for the tests of views and reports."""

from datetime import UTC, datetime, timedelta
from typing import Any

from protocol.devices import Device, DeviceProfile
from protocol.events import Event, EventType
from protocol.runs import ModelVersion, Round, RoundDevice, Run, RunCreate, Scores, Traffic
from protocol.statuses import AssignmentStatus, DeviceStatus, RoundStatus, RunStatus
from protocol.strategies import CoPlmsSettings

START = datetime(2026, 1, 1, tzinfo=UTC)
SHA = "0" * 64


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def scores(exact_match: float, num_rows: int = 150) -> Scores:
    return Scores(rouge_l=exact_match + 5, exact_match=exact_match, bits_per_byte=2.0, num_rows=num_rows)


def device(name: str) -> Device:
    profile = DeviceProfile(
        agent_version="0", platform="Linux", cpu_count=2, memory_bytes=1, model_name=name, model_architecture="gpt2",
        model_parameters=700_000, tokenizer_kind="byte-level BPE, 512 tokens", domain="web", num_examples=240,
    )  # fmt: skip
    return Device(
        device_id=f"id-{name}", name=name, status=DeviceStatus.REGISTERED, profile=profile, activity="idle",
        enrolled_at=START, last_seen_at=START,
    )  # fmt: skip


def round_device(
    name: str, status: AssignmentStatus = AssignmentStatus.COUNTED, metrics: dict[str, Any] | None = None
) -> RoundDevice:
    return RoundDevice(
        assignment_id=f"a-{name}", device_id=f"id-{name}", device_name=name, status=status, stage="mutual_learning",
        step=3, steps=10, losses={"slm": 1.25}, metrics=metrics or {}, offered_at=START,
    )  # fmt: skip


def a_round(number: int, devices: list[RoundDevice], status: RoundStatus = RoundStatus.PUBLISHED) -> Round:
    return Round(
        round_id=f"r{number}", run_id="run", number=number, status=status, base_version=number - 1, devices=devices,
        opened_at=START, deadline_at=at(3600),
    )  # fmt: skip


def a_run(status: RunStatus = RunStatus.RUNNING, current_round: int = 1, reason: str | None = None) -> Run:
    config = RunCreate(name="co-tuning", strategy=CoPlmsSettings(), rounds=3, llm="llm", public_data="public.jsonl")
    return Run(
        run_id="run", name="co-tuning", status=status, status_reason=reason, config=config,
        current_round=current_round, created_at=START,
    )  # fmt: skip


def traffic() -> Traffic:
    return Traffic(up={"adapter_delta": 3_000_000, "logits": 40_000, "metrics": 900}, down={"proxy_base": 5_000_000})


def a_version(number: int, test: dict[str, Scores]) -> ModelVersion:
    return ModelVersion(
        run_id="run", number=number, round_id=None, promoted=True, proxy_adapter_sha256=SHA, llm_adapter_sha256=SHA,
        num_updates=3, metrics={"test": {name: each.model_dump() for name, each in test.items()}}, created_at=START,
    )  # fmt: skip


def an_event(sequence: int, type: EventType, seconds: float, round_id: str | None = None, **data: Any) -> Event:  # noqa: A002
    return Event(sequence=sequence, type=type, time=at(seconds), run_id="run", round_id=round_id, data=data)
