"""Aggregates a round's updates: theta_bar from theta_t and the devices' deltas (docs/method.md, step 4).

Updates are read one by one, late ones of earlier rounds first, each in the order of the device ids, so memory does not
grow with their number and a repeated aggregation gives the same bytes. The API has admitted each by its header; here
its values are looked at. One that is refused is not counted, and its device and the operator can read why.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from sqlalchemy.orm import Session
from torch import Tensor

from assets.errors import TensorFileError
from assets.vocabulary_files import refusing
from cotuning.staleness import staleness_discount
from cotuning.strategies.aggregation import Aggregate
from cotuning.strategies.combining import (
    Combined,
    MessageCheck,
    NotCounted,
    SentUpdate,
    combine,
    counted_examples,
)
from cotuning.strategies.interface import Aggregator, DeviceMessage, LogitsReader, ServerInputs, StrategySteps
from cotuning.strategies.registry import steps_of
from persistence import artifacts, results, rounds, updates, versions
from persistence.blobs import StoredBlob
from persistence.clock import database_now
from persistence.round_lifecycle import lock_round
from persistence.rounds import RoundContext
from persistence.updates import UpdateRecord
from protocol.base import MAX_COUNT
from protocol.errors import ErrorCode
from protocol.runs import AlignmentMetrics
from protocol.statuses import PartKind, RoundStatus
from protocol.strategies import spec_of
from worker.adapter_files import get_adapter, get_optimizer_state, put_adapter, put_optimizer_state
from worker.device_parts import read_part
from worker.message_files import get_message, get_server_state, read_device_message
from worker.round_metrics import grown
from worker.row_files import RowFiles, get_rows
from worker.stage import Finish, Work


def aggregate(work: Work) -> Finish:
    """Average the round's updates and store the result."""
    start = time.perf_counter()
    assert work.job.round_id is not None
    with work.database.reading() as session:
        context = rounds.get_context(session, work.job.round_id)
        submitted = updates.submitted_updates(session, work.job.round_id)
    settings = context.config.strategy
    by_key = {update.assignment_id: update for update in submitted}
    combined = Combined(counted=list(by_key))
    if spec_of(settings).parts:
        combined = _combine(work, context, submitted)
    quarantines = settings.averaging is not None and settings.averaging.norm_gate == "quarantine"
    kept = frozenset({ErrorCode.NORM_OUTLIER} if quarantines else ())
    adapter, state = _store(work, context, combined.aggregate) if combined.aggregate is not None else (None, None)
    metrics = _metrics(context, by_key, combined, kept, time.perf_counter() - start)

    def finish(session: Session) -> None:
        now = database_now(session)
        lock_round(session, context.round_id)  # before the assignments: the order in which everybody locks
        for assignment_id, (code, reason) in combined.refused.items():
            hold_back = updates.quarantine_update if code in kept else updates.reject_update
            hold_back(session, assignment_id, ErrorCode(code), reason, now)
        for blob, kind in ((adapter, "adapter"), (state, "server_optimizer")):
            if blob is not None:
                artifacts.register(session, blob.sha256, blob.size, kind, context.run_id, now)
        results.finish_aggregation(
            session,
            work.job,
            work.owner,
            adapter.sha256 if adapter is not None else None,
            combined.counted,
            metrics,
            now,
            server_optimizer_sha256=state.sha256 if state is not None else None,
        )

    return finish


def _metrics(
    context: RoundContext,
    by_key: Mapping[str, UpdateRecord],
    combined: Combined,
    kept: frozenset[ErrorCode],
    seconds: float,
) -> dict[str, Any]:
    """What the round's metrics gain; `kept` are the codes of updates that are quarantined and not rejected."""
    settings = context.config.strategy
    counted = [by_key[key] for key in combined.counted]
    refused = [(by_key[key].device_id, ErrorCode(code)) for key, (code, _) in combined.refused.items()]
    return grown(
        context,
        RoundStatus.AGGREGATING,
        seconds,
        num_updates=len(counted),
        num_examples=sum(counted_examples(update.num_examples, settings) for update in counted),
        update_norms={by_key[key].device_id: norm for key, norm in combined.norms.items()},
        update_ranks={update.device_id: update.adapter_rank for update in counted if update.adapter_rank is not None},
        late_updates={update.assignment_id: update.staleness for update in counted if update.staleness is not None},
        rejected={device_id: code for device_id, code in refused if code not in kept},
        quarantined={device_id: code for device_id, code in refused if code in kept},
        alignment=_together(counted),
        aggregation_errors=combined.aggregate.errors if combined.aggregate is not None else {},
    )


def _combine(work: Work, context: RoundContext, submitted: Sequence[UpdateRecord]) -> Combined:
    settings = context.config.strategy
    steps, spec = steps_of(settings), spec_of(settings)
    uploads = spec.uploads
    return combine(
        [_sent(work, context, update) for update in submitted],
        settings,
        aggregator=_begin_mean(work, context, steps) if PartKind.ADAPTER_DELTA in uploads else None,
        logits=_expected_logits(work, context, steps) if PartKind.LOGITS in uploads else None,
        message=_message_check(work, context, steps) if spec.messages_up else None,
        on_update=work.lease.check,
    )


def _sent(work: Work, context: RoundContext, update: UpdateRecord) -> SentUpdate:
    alignment = _alignment(update)

    def read(kind: PartKind) -> tuple[dict[str, Tensor], dict[str, str]]:
        try:
            return read_part(work.blobs, update, kind)
        except TensorFileError as error:
            raise NotCounted(ErrorCode.NOT_SAFETENSORS, str(error)) from error

    return SentUpdate(
        key=update.assignment_id,
        num_examples=update.num_examples,
        coverage=alignment.coverage if alignment is not None else None,
        read_delta=lambda: read(PartKind.ADAPTER_DELTA)[0],
        read_logits=lambda: read(PartKind.LOGITS),
        read_message=lambda: _message(work, context, update),
        rank=update.adapter_rank,
        discount=staleness_discount(update.staleness or 0, context.config.staleness_exponent),
    )


def _message(work: Work, context: RoundContext, update: UpdateRecord) -> DeviceMessage | None:
    """A late update's message answers what devices were sent for another round: it is not used, and not looked at."""
    if update.staleness is not None:
        return None
    return read_device_message(work.blobs, update, spec_of(context.config.strategy))


def _message_check(work: Work, context: RoundContext, steps: StrategySteps[Any]) -> MessageCheck:
    spec = spec_of(context.config.strategy)
    with work.database.reading() as session:
        rows = RowFiles.of(versions.get_version(session, context.run_id, 0))
    probe = context.probe_set_sha256
    given = ServerInputs(
        round_number=context.number,
        seed=context.config.seed,
        on_progress=work.lease.on_progress,
        public=get_rows(work.blobs, rows.training) if rows is not None else (),
        probe=get_rows(work.blobs, probe) if probe is not None else (),
        message=get_message(work.blobs, context.base_message_sha256, spec),
        state=get_server_state(work.blobs, context.base_server_state_sha256),
    )

    def check(sent: DeviceMessage) -> None:
        with refusing("a tokenizer that reads the probe rows") if sent.vocabulary is not None else nullcontext():
            steps.check_message(sent, given)

    return check


def _begin_mean(work: Work, context: RoundContext, steps: StrategySteps[Any]) -> Aggregator:
    """The server optimizer's state is the one that the base version's round left, so that doing this again, or after a
    version that was not promoted, starts from the right one."""
    assert context.base_adapter_sha256 is not None
    shared = get_adapter(work.blobs, context.base_adapter_sha256)
    state = context.base_optimizer_sha256
    return steps.aggregator(shared, get_optimizer_state(work.blobs, state) if state else None)


def _expected_logits(work: Work, context: RoundContext, steps: StrategySteps[Any]) -> LogitsReader:
    assert context.probe_set_sha256 is not None
    with work.lease.long_call("loading the small model"):
        manifest = context.proxy_manifest_sha256
        shared_model = work.cache.proxy(manifest) if manifest is not None else None
        return steps.logits_reader(shared_model, get_rows(work.blobs, context.probe_set_sha256))


def _store(work: Work, context: RoundContext, aggregate: Aggregate) -> tuple[StoredBlob, StoredBlob | None]:
    """Store theta_bar, and the optimizer's state where there is one."""
    assert context.proxy_manifest_sha256 is not None
    adapter = put_adapter(work.blobs, aggregate.adapter, proxy_sha256=context.proxy_manifest_sha256)
    state = aggregate.optimizer_state
    return adapter, put_optimizer_state(work.blobs, state) if state else None


def _alignment(update: UpdateRecord) -> AlignmentMetrics | None:
    reported = update.metrics.get("alignment")
    return None if reported is None else AlignmentMetrics.model_validate(reported)


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
