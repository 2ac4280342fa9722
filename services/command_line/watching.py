"""Looks at a run from outside, and tells in words what changed between two looks."""

from dataclasses import dataclass

from command_line.api_client import ApiClient
from protocol.runs import Round, Run, Traffic
from protocol.statuses import AssignmentStatus, RoundStatus, RunStatus
from protocol.strategies import SmallModel, spec_of


@dataclass(frozen=True)
class Look:
    """A run as it was at one moment."""

    run: Run
    round: Round | None
    traffic: Traffic


class RunWatch:
    """Reads one run again and again; reads its round and traffic only as often as they can have changed."""

    def __init__(self, client: ApiClient, run_id: str) -> None:
        self._client = client
        self._run_id = run_id

    def look(self) -> Look:
        """Return the run as it is now, with its newest round."""
        run = self._client.get_run(self._run_id)
        newest = self._client.get_round(self._run_id, run.current_round) if run.current_round else None
        return Look(run, newest, self._client.traffic(self._run_id))


ROUND_WORDS = {
    RoundStatus.OPEN: "waits for devices",
    RoundStatus.COLLECTING: "devices train",
    RoundStatus.AGGREGATING: "the worker averages the updates",
    RoundStatus.CO_TUNING: "the LLM and the small model teach each other",
    RoundStatus.EVALUATING: "the worker measures the new version",
    RoundStatus.PUBLISHED: "published",
    RoundStatus.FAILED: "failed",
    RoundStatus.ABANDONED: "abandoned",
}


def round_words(run: Run, status: RoundStatus) -> str:
    """Return what goes on in a round of that status."""
    spec = spec_of(run.config.strategy)
    nothing_to_average = status in _WORKER_STAGES and spec.small_model is SmallModel.NONE
    if nothing_to_average or (status is RoundStatus.CO_TUNING and not spec.trains_llm):
        return "the worker closes the round"
    return ROUND_WORDS[status]


_WORKER_STAGES = frozenset({RoundStatus.AGGREGATING, RoundStatus.CO_TUNING, RoundStatus.EVALUATING})

TOLD = frozenset(
    {
        AssignmentStatus.SUBMITTED,
        AssignmentStatus.QUARANTINED,
        AssignmentStatus.REJECTED,
        AssignmentStatus.LATE,
        AssignmentStatus.LOST,
    }
)
"""What is told of a device; the rest of its life in a round is for the live view."""


TROUBLE: frozenset[str] = frozenset(
    {RunStatus.FAILED, RunStatus.STOPPED, RunStatus.PAUSED, RoundStatus.FAILED, RoundStatus.ABANDONED}
)
"""Statuses whose reason is news; that of the others says what they wait for, which changes all the time."""


def changes(before: Look | None, now: Look) -> list[str]:
    """Return one line for every change from `before` to `now` that a person wants to be told; of steps, nothing."""
    lines: list[str] = []
    if before is None or before.run.status != now.run.status:
        reason = now.run.status_reason if now.run.status in TROUBLE else None
        lines.append(f"{now.run.name}: {now.run.status}{_because(reason)}")
    if now.round is None:
        return lines
    known = before.round if before and before.round and before.round.number == now.round.number else None
    former = {each.device_id: each.status for each in known.devices} if known else {}
    place = f"{now.run.name}: round {now.round.number} of {now.run.config.rounds}"
    for device in now.round.devices:
        if device.status in TOLD and former.get(device.device_id) != device.status:
            losses = "".join(f", {name} {value:.3f}" for name, value in device.losses.items())
            lines.append(f"{place}: {device.device_name} {device.status}{losses}{_because(device.reason)}")
    words = round_words(now.run, now.round.status)
    if known is None or round_words(now.run, known.status) != words:
        reason = now.round.status_reason if now.round.status in TROUBLE else None
        lines.append(f"{place}: {words}{_because(reason)}")
    return lines


def _because(reason: str | None) -> str:
    return f" ({reason})" if reason else ""
