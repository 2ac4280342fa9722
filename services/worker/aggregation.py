"""Aggregates a round's updates: theta_bar from theta_t and the devices' deltas (docs/method.md, step 4).

Updates are read one by one, late ones of earlier rounds first, each in the order of the device ids, so memory does not
grow with their number and a repeated aggregation gives the same bytes. The API has admitted each by its header; here
its values are looked at. One that is refused is not counted, and its device and the operator can read why.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy.orm import Session

from assets.errors import TensorFileError
from cotuning.aggregation import UpdateRefused, update_norm
from cotuning.norm_gate import unusual_norms
from cotuning.payload import PayloadError
from cotuning.staleness import staleness_discount
from cotuning.strategies.aggregation import Aggregate
from cotuning.strategies.interface import Aggregator, StrategySteps
from cotuning.strategies.registry import steps_of
from persistence import artifacts, results, rounds, updates
from persistence.blobs import StoredBlob
from persistence.clock import database_now
from persistence.round_lifecycle import lock_round
from persistence.rounds import RoundContext
from persistence.updates import UpdateRecord
from protocol.base import MAX_COUNT
from protocol.errors import ErrorCode
from protocol.runs import AlignmentMetrics
from protocol.statuses import PartKind, RoundStatus
from protocol.strategies import AveragingSettings, Strategy, spec_of
from worker.adapter_files import get_adapter, get_optimizer_state, put_adapter, put_optimizer_state
from worker.device_parts import DeviceLogits, read_part
from worker.round_metrics import grown
from worker.row_files import get_rows
from worker.stage import Finish, Work


@dataclass
class _Tally:
    """What became of each update. Counted ones are identified by assignment, numbers are kept by device."""

    counted: list[UpdateRecord] = field(default_factory=list)
    norms: dict[str, float] = field(default_factory=dict)
    refused: list[tuple[UpdateRecord, ErrorCode, str]] = field(default_factory=list)


def aggregate(work: Work) -> Finish:
    """Average the round's updates and store the result."""
    start = time.perf_counter()
    assert work.job.round_id is not None
    with work.database.reading() as session:
        context = rounds.get_context(session, work.job.round_id)
        submitted = updates.submitted_updates(session, work.job.round_id)
    settings = context.config.strategy
    tally, aggregate = _Tally(counted=submitted), None
    if spec_of(settings).uploads:
        tally, aggregate = _combine(work, context, submitted)
    quarantines = settings.averaging is not None and settings.averaging.norm_gate == "quarantine"
    kept = frozenset({ErrorCode.NORM_OUTLIER} if quarantines else ())
    adapter, state = _store(work, context, aggregate) if aggregate is not None else (None, None)
    metrics = _metrics(context, settings, tally, aggregate, kept, time.perf_counter() - start)

    def finish(session: Session) -> None:
        now = database_now(session)
        lock_round(session, context.round_id)  # before the assignments: the order in which everybody locks
        for update, code, reason in tally.refused:
            hold_back = updates.quarantine_update if code in kept else updates.reject_update
            hold_back(session, update.assignment_id, code, reason, now)
        for blob, kind in ((adapter, "adapter"), (state, "server_optimizer")):
            if blob is not None:
                artifacts.register(session, blob.sha256, blob.size, kind, context.run_id, now)
        results.finish_aggregation(
            session,
            work.job,
            work.owner,
            adapter.sha256 if adapter is not None else None,
            [update.assignment_id for update in tally.counted],
            metrics,
            now,
            server_optimizer_sha256=state.sha256 if state is not None else None,
        )

    return finish


def _metrics(  # noqa: PLR0917
    context: RoundContext,
    settings: Strategy,
    tally: _Tally,
    aggregate: Aggregate | None,
    kept: frozenset[ErrorCode],
    seconds: float,
) -> dict[str, Any]:
    """What the round's metrics gain; `kept` are the codes of updates that are quarantined and not rejected."""
    return grown(
        context,
        RoundStatus.AGGREGATING,
        seconds,
        num_updates=len(tally.counted),
        num_examples=sum(_weight(update, settings) for update in tally.counted),
        update_norms=tally.norms,
        update_ranks={
            update.device_id: update.adapter_rank for update in tally.counted if update.adapter_rank is not None
        },
        late_updates={u.assignment_id: u.staleness for u in tally.counted if u.staleness is not None},
        rejected={update.device_id: code for update, code, _ in tally.refused if code not in kept},
        quarantined={update.device_id: code for update, code, _ in tally.refused if code in kept},
        alignment=_together(tally.counted),
        aggregation_errors=aggregate.errors if aggregate is not None else {},
    )


def _combine(work: Work, context: RoundContext, submitted: Sequence[UpdateRecord]) -> tuple[_Tally, Aggregate | None]:
    """Return the tally and theta_bar; None when nothing is left to aggregate, or devices send no deltas."""
    settings = context.config.strategy
    steps, uploads = steps_of(settings), spec_of(settings).uploads
    aggregator = _begin_mean(work, context, steps) if PartKind.ADAPTER_DELTA in uploads else None
    logits = _expected_logits(work, context, steps) if PartKind.LOGITS in uploads else None
    tally, unusual = _Tally(), _unusual(work, settings.averaging, submitted)
    for update in submitted:
        work.lease.check()
        if update.assignment_id in unusual:
            tally.refused.append((update, ErrorCode.NORM_OUTLIER, unusual[update.assignment_id]))
            continue
        low = _low_coverage(update, settings.least_coverage)
        if low is not None:
            tally.refused.append((update, ErrorCode.COVERAGE_TOO_LOW, low))
            continue
        try:
            if logits is not None:
                logits.read(update)
            if aggregator is not None:
                delta, _ = read_part(work.blobs, update, PartKind.ADAPTER_DELTA)
                discount = staleness_discount(update.staleness or 0, context.config.staleness_exponent)
                weight = _weight(update, settings) * discount
                tally.norms[update.device_id] = aggregator.add(delta, weight, rank=update.adapter_rank)
        except UpdateRefused as error:
            tally.refused.append((update, ErrorCode(error.code), str(error)))
        except PayloadError as error:
            tally.refused.append((update, ErrorCode.LOGITS_MISMATCH, str(error)))
        except TensorFileError as error:
            tally.refused.append((update, ErrorCode.NOT_SAFETENSORS, str(error)))
        else:
            tally.counted.append(update)
    return tally, aggregator.result() if aggregator is not None and tally.counted else None


def _begin_mean(work: Work, context: RoundContext, steps: StrategySteps[Any]) -> Aggregator:
    """The server optimizer's state is the one that the base version's round left, so that doing this again, or after a
    version that was not promoted, starts from the right one."""
    assert context.base_adapter_sha256 is not None
    shared = get_adapter(work.blobs, context.base_adapter_sha256)
    state = context.base_optimizer_sha256
    return steps.aggregator(shared, get_optimizer_state(work.blobs, state) if state else None)


def _expected_logits(work: Work, context: RoundContext, steps: StrategySteps[Any]) -> DeviceLogits:
    assert context.probe_set_sha256 is not None
    with work.lease.long_call("loading the small model"):
        manifest = context.proxy_manifest_sha256
        shared_model = work.cache.proxy(manifest) if manifest is not None else None
    return DeviceLogits(work.blobs, steps, shared_model, get_rows(work.blobs, context.probe_set_sha256))


def _unusual(work: Work, settings: AveragingSettings | None, submitted: Sequence[UpdateRecord]) -> dict[str, str]:
    """Say of which assignments the delta's norm is unlike the others', and how.

    It reads every delta once more, as no sum can be begun before the norms are known. What is no usable delta at all
    is left to the sum to refuse, and is no part of the distribution.
    """
    if settings is None or settings.norm_gate == "off" or len(submitted) < settings.norm_gate_min_updates:
        return {}
    norms: dict[str, float] = {}
    for update in submitted:
        work.lease.check()
        try:
            norm = update_norm(read_part(work.blobs, update, PartKind.ADAPTER_DELTA)[0])
        except TensorFileError:
            continue
        if norm <= settings.max_update_norm:  # false for NaN
            norms[update.assignment_id] = norm
    return unusual_norms(
        norms, most_deviations=settings.norm_gate_deviations, min_updates=settings.norm_gate_min_updates
    )


def _store(work: Work, context: RoundContext, aggregate: Aggregate) -> tuple[StoredBlob, StoredBlob | None]:
    """Store theta_bar, and the optimizer's state where there is one."""
    assert context.proxy_manifest_sha256 is not None
    adapter = put_adapter(work.blobs, aggregate.adapter, proxy_sha256=context.proxy_manifest_sha256)
    state = aggregate.optimizer_state
    return adapter, put_optimizer_state(work.blobs, state) if state else None


def _weight(update: UpdateRecord, settings: Strategy) -> int:
    """Return n_i. What a device says of itself cannot be checked, only bounded."""
    averaging = settings.averaging
    return update.num_examples if averaging is None else min(update.num_examples, averaging.max_examples)


def _alignment(update: UpdateRecord) -> AlignmentMetrics | None:
    reported = update.metrics.get("alignment")
    return None if reported is None else AlignmentMetrics.model_validate(reported)


def _low_coverage(update: UpdateRecord, least: float) -> str | None:
    """Say why what was learnt through an alignment that did not work is refused; None if it worked."""
    alignment = _alignment(update)
    if alignment is None or alignment.coverage >= least:
        return None
    return (
        f"expected at least {least:.2f} of the response bytes inside aligned spans, got {alignment.coverage:.2f}; "
        "the tokenizers of this device and of the proxy do not agree on the text"
    )


def _together(counted: Sequence[UpdateRecord]) -> AlignmentMetrics | None:
    """The devices' alignment reports as one; shares are weighted by spans."""
    reports = [alignment for update in counted if (alignment := _alignment(update)) is not None]
    if not reports:
        return None
    spans = sum(report.num_spans for report in reports)
    weights = [report.num_spans / spans if spans else 1 / len(reports) for report in reports]
    pairs = list(zip(weights, reports, strict=True))
    return AlignmentMetrics(
        coverage=min(1.0, sum(weight * report.coverage for weight, report in pairs)),
        class_agreement=min(1.0, sum(weight * report.class_agreement for weight, report in pairs)),
        num_spans=min(spans, MAX_COUNT),
        skipped_rows=min(sum(report.skipped_rows for report in reports), MAX_COUNT),
    )
