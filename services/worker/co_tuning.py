"""The cloud's share of a round: the LLM and the proxy teach each other on public rows (SAML; docs/method.md, step 5).

The devices' probe logits are one more teacher where they beat the model that they teach.
"""

import time

from sqlalchemy.orm import Session

from assets.models import folder_identity
from cotuning.payload import PayloadRows
from cotuning.shared_rows import CoverageTooLow
from cotuning.strategies import co_plms
from cotuning.strategies.results import ServerResult
from cotuning.training import TrainingDiverged
from persistence import artifacts, results, rounds, updates, versions
from persistence.clock import database_now
from persistence.rounds import RoundContext
from persistence.updates import UpdateRecord
from protocol.errors import DomainError, ErrorCode
from protocol.statuses import RoundStatus
from protocol.strategies import CoPlmsSettings
from worker.adapter_files import get_adapter, put_adapter
from worker.checkpoints import drop_outdated, forget_when_stored, open_checkpoints, round_place
from worker.device_logits import LogitsReader
from worker.round_metrics import grown
from worker.row_files import RowFiles, get_rows
from worker.stage import Finish, Work


def co_tune(work: Work) -> Finish:
    """Make the candidate pair of adapters from the aggregate. A strategy without a proxy has none.

    Raises:
        DomainError: COVERAGE_TOO_LOW, the LLM's and the proxy's tokenizers cannot be aligned; JOB_FAILED, a loss is
            not a number.
    """
    start = time.perf_counter()
    assert work.job.round_id is not None
    with work.database.reading() as session:
        context = rounds.get_context(session, work.job.round_id)
        everything = updates.submitted_updates(session, work.job.round_id)
        # A late update's logits are of an older proxy, and its device may have sent newer ones.
        counted = [update for update in everything if update.staleness is None]
        rows = None
        if isinstance(context.config.strategy, CoPlmsSettings):
            rows = RowFiles.of(versions.get_version(session, context.run_id, 0))
    if not isinstance(context.config.strategy, CoPlmsSettings) or rows is None:
        metrics = grown(context, RoundStatus.CO_TUNING, time.perf_counter() - start)
        return lambda session: results.finish_co_tuning(
            session, work.job, work.owner, None, None, metrics, database_now(session)
        )
    with work.lease.long_call("beginning the mutual learning"):
        result = _learn(work, context, context.config.strategy, rows, counted)
    metrics = grown(
        context,
        RoundStatus.CO_TUNING,
        time.perf_counter() - start,
        losses=result.losses,
        teacher_rows=_teacher_rows(result, [update.device_id for update in counted]),
    )
    assert context.proxy_manifest_sha256 is not None
    adapter = put_adapter(work.blobs, result.shared_adapter, proxy_sha256=context.proxy_manifest_sha256)
    llm_adapter = put_adapter(work.blobs, result.llm_adapter, proxy_sha256=context.proxy_manifest_sha256)

    def finish(session: Session) -> None:
        forget_when_stored(work, session)
        now = database_now(session)
        artifacts.register(session, adapter.sha256, adapter.size, "adapter", context.run_id, now)
        artifacts.register(session, llm_adapter.sha256, llm_adapter.size, "llm_adapter", context.run_id, now)
        results.finish_co_tuning(session, work.job, work.owner, adapter.sha256, llm_adapter.sha256, metrics, now)

    return finish


def _teacher_rows(result: ServerResult, device_ids: list[str]) -> dict[str, dict[str, int]]:
    if result.teacher is None:
        return {}
    rows = {"llm": result.teacher.llm_rows, "proxy": result.teacher.proxy_rows}
    return {model: dict(zip(device_ids, numbers, strict=True)) for model, numbers in rows.items() if numbers}


def _learn(
    work: Work, context: RoundContext, settings: CoPlmsSettings, rows: RowFiles, counted: list[UpdateRecord]
) -> ServerResult:
    config = context.config
    assert config.llm is not None
    drop_outdated(work)
    assert context.proxy_manifest_sha256 is not None
    assert context.probe_set_sha256 is not None
    assert context.aggregated_adapter_sha256 is not None
    assert context.base_llm_adapter_sha256 is not None
    llm = work.cache.llm(config.llm, config.llm_loading)
    proxy = work.cache.proxy(context.proxy_manifest_sha256)
    probe = get_rows(work.blobs, context.probe_set_sha256)
    reader = LogitsReader(work.blobs, proxy, probe, settings)
    logits: list[PayloadRows] = []
    for update in counted if settings.server.device_teacher != "off" else ():
        work.lease.check()
        logits.append(reader.read(update))
    try:
        return co_plms.server_step(
            llm=llm,
            proxy=proxy,
            public=get_rows(work.blobs, rows.training),
            probe=probe,
            shared_adapter=get_adapter(work.blobs, context.aggregated_adapter_sha256),
            llm_adapter=get_adapter(work.blobs, context.base_llm_adapter_sha256),
            device_logits=logits,
            settings=settings,
            round_number=context.number,
            seed=config.seed,
            on_progress=work.lease.on_progress,
            checkpoints=open_checkpoints(
                work,
                round_place(context.number),
                about=_determined_by(context, settings, rows, counted),
                every=settings.server.checkpoint_steps,
            ),
        )
    except CoverageTooLow as error:
        detail = f"the LLM and the proxy: {error}"
        raise DomainError(
            ErrorCode.COVERAGE_TOO_LOW, detail, expected=error.expected, received=error.received
        ) from error
    except TrainingDiverged as error:
        raise DomainError(ErrorCode.JOB_FAILED, str(error)) from error


def _determined_by(
    context: RoundContext, settings: CoPlmsSettings, rows: RowFiles, counted: list[UpdateRecord]
) -> list[object]:
    """What the round's mutual learning follows from, beside what its loop sees."""
    config = context.config
    assert config.llm is not None
    return [
        settings.model_dump(mode="json"),
        [config.seed, context.number],
        [folder_identity(config.llm), config.llm_loading.model_dump(mode="json"), context.base_llm_adapter_sha256],
        [context.proxy_manifest_sha256, context.aggregated_adapter_sha256],
        [rows.training, context.probe_set_sha256],
        [update.parts for update in counted],
    ]
