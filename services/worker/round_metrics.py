"""A round's metrics (`protocol.runs.RoundMetrics`), grown stage by stage."""

from collections.abc import Mapping
from typing import Any

from assets.process_memory import peak_memory
from persistence.rounds import RoundContext
from protocol.runs import RoundMetrics
from protocol.statuses import RoundStatus


def grown(context: RoundContext, stage: RoundStatus, seconds: float, **measured: Any) -> dict[str, Any]:
    """Return the round's metrics so far with what `stage` measured, its wall-clock seconds and its peak memory."""
    before = RoundMetrics.model_validate(context.metrics)
    after = before.model_copy(
        update={
            **measured,
            "seconds_by_stage": _with(before.seconds_by_stage, stage, seconds),
            "peak_memory_bytes": _with(before.peak_memory_bytes, stage, peak_memory()),
        }
    )
    return after.model_dump(mode="json", exclude_none=True)


def _with(values: Mapping[str, Any], stage: RoundStatus, value: float) -> dict[str, Any]:
    return {**values, stage.value: value}
