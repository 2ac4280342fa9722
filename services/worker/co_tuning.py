"""The server's step of a round, after aggregation: what the strategy does with LLM, shared small model and public rows.

What devices send as messages goes to it as it came, and its own message and state are stored with the candidate.

For Co-PLMs the LLM and the proxy teach each other (SAML; docs/method.md, step 5), and the devices' probe logits are one
more teacher where they beat the model that they teach.
"""

import time
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from sqlalchemy.orm import Session

from assets.models import folder_identity
from cotuning.shared_rows import CoverageTooLow
from cotuning.strategies.interface import DeviceMessage, ServerInputs, StrategySteps
from cotuning.strategies.registry import steps_of
from cotuning.strategies.results import ServerResult
from cotuning.training import TrainingDiverged
from cotuning.vocabulary import Vocabulary
from persistence import artifacts, results, rounds, updates, versions
from persistence.blobs import StoredBlob
from persistence.clock import database_now
from persistence.results import Candidate
from persistence.rounds import RoundContext
from persistence.updates import UpdateRecord
from protocol.errors import DomainError, ErrorCode
from protocol.statuses import PartKind, RoundStatus
from protocol.strategies import PublicSet, StrategySpec, spec_of
from worker.adapter_files import get_adapter, put_adapter
from worker.checkpoints import drop_outdated, forget_when_stored, open_checkpoints, round_place
from worker.device_parts import read_part
from worker.message_files import get_message, get_server_state, put_message, put_server_state, read_device_message
from worker.round_metrics import grown
from worker.round_models import load_round_models
from worker.row_files import RowFiles, get_rows
from worker.stage import Finish, Work


def co_tune(work: Work) -> Finish:
    """Make the candidate from the aggregate: a pair of adapters, of which a strategy may have only one, or none; the
    message that goes to all devices with it; and what the server keeps.

    Raises:
        DomainError: COVERAGE_TOO_LOW, two tokenizers cannot be aligned on public rows; JOB_FAILED, a loss is not a
            number.
    """
    start = time.perf_counter()
    assert work.job.round_id is not None
    with work.database.reading() as session:
        context = rounds.get_context(session, work.job.round_id)
        everything = updates.submitted_updates(session, work.job.round_id)
        rows = RowFiles.of(versions.get_version(session, context.run_id, 0))
    # A late update's logits and message are of an older version, and its device may have sent newer ones.
    counted = [update for update in everything if update.staleness is None]
    result = _serve(work, context, rows, counted)
    message = spec_of(context.config.strategy).sent_message
    heard = [update.device_id for update in counted if message is None or message in update.parts]
    metrics = grown(
        context,
        RoundStatus.CO_TUNING,
        time.perf_counter() - start,
        losses=result.losses,
        teacher_rows=_teacher_rows(result, heard),
    )
    files = _store(work, context, result)
    candidate = Candidate(*(None if blob is None else blob.sha256 for _, blob in files))

    def finish(session: Session) -> None:
        forget_when_stored(work, session)
        now = database_now(session)
        for kind, blob in files:
            if blob is not None:
                artifacts.register(session, blob.sha256, blob.size, kind, context.run_id, now)
        results.finish_co_tuning(session, work.job, work.owner, candidate, metrics, now)

    return finish


def _store(work: Work, context: RoundContext, result: ServerResult) -> list[tuple[str, StoredBlob | None]]:
    """Store what the server's step made; the files by kind, in the order of `Candidate`."""
    spec = spec_of(context.config.strategy)
    adapter, llm_adapter = (
        put_adapter(work.blobs, state, proxy_sha256=context.proxy_manifest_sha256) if state is not None else None
        for state in (result.shared_adapter, result.llm_adapter)
    )
    return [
        ("adapter", adapter),
        ("llm_adapter", llm_adapter),
        (str(spec.received_message), put_message(work.blobs, result.message, spec)),
        ("server_state", put_server_state(work.blobs, result.state)),
    ]


def _teacher_rows(result: ServerResult, device_ids: list[str]) -> dict[str, dict[str, int]]:
    if result.teacher is None:
        return {}
    rows = {"llm": result.teacher.llm_rows, "proxy": result.teacher.proxy_rows}
    return {model: dict(zip(device_ids, numbers, strict=True)) for model, numbers in rows.items() if numbers}


def _serve(work: Work, context: RoundContext, rows: RowFiles | None, counted: list[UpdateRecord]) -> ServerResult:
    """The strategy's server step. One that trains nothing on public rows is given neither models nor rows."""
    steps, spec = steps_of(context.config.strategy), spec_of(context.config.strategy)
    given = ServerInputs(
        round_number=context.number,
        seed=context.config.seed,
        on_progress=work.lease.on_progress,
        shared_adapter=_adapter(work, context.aggregated_adapter_sha256 or context.base_adapter_sha256),
        llm_adapter=_adapter(work, context.base_llm_adapter_sha256),
        message=get_message(work.blobs, context.base_message_sha256, spec),
        state=get_server_state(work.blobs, context.base_server_state_sha256),
    )
    trains = spec.public_set is not PublicSet.NOWHERE
    try:
        with work.lease.long_call("beginning the server's step") if trains else nullcontext():
            if trains:
                assert rows is not None
                given = _with_models(work, context, steps, given, rows, counted)
            return steps.server_step(replace(given, device_messages=_messages(work, given, spec, counted)))
    except CoverageTooLow as error:
        detail = f"the LLM and the small model: {error}"
        raise DomainError(
            ErrorCode.COVERAGE_TOO_LOW, detail, expected=error.expected, received=error.received
        ) from error
    except TrainingDiverged as error:
        raise DomainError(ErrorCode.JOB_FAILED, str(error)) from error


def _with_models(  # noqa: PLR0917
    work: Work,
    context: RoundContext,
    steps: StrategySteps[Any],
    given: ServerInputs,
    rows: RowFiles,
    counted: list[UpdateRecord],
) -> ServerInputs:
    drop_outdated(work)
    models = load_round_models(work, context)
    probe = get_rows(work.blobs, context.probe_set_sha256) if context.probe_set_sha256 is not None else []
    read = []
    if counted and steps.learns_from_logits:
        check = steps.logits_reader(models.shared_model, probe)
        for update in counted:
            work.lease.check()
            read.append(check(*read_part(work.blobs, update, PartKind.LOGITS)))
    server = context.config.strategy.server_steps
    return replace(
        given,
        llm=models.llm,
        shared_model=models.shared_model,
        public=get_rows(work.blobs, rows.training),
        probe=probe,
        device_logits=read,
        checkpoints=open_checkpoints(
            work,
            round_place(context.number),
            about=_determined_by(context, rows, counted),
            every=server.checkpoint_steps if server is not None else 0,
        ),
    )


def _messages(work: Work, given: ServerInputs, spec: StrategySpec, counted: list[UpdateRecord]) -> list[DeviceMessage]:
    """Those of the counted updates that have one, in the order of the devices; each was looked at when it counted."""
    messages = []
    known: dict[str, Vocabulary] = {}
    device = given.llm.device if given.llm is not None else "cpu"
    for update in counted:
        work.lease.check()
        message = read_device_message(work.blobs, update, spec, device, known=known)
        messages += [message] if message is not None else []
    return messages


def _adapter(work: Work, sha256: str | None) -> dict[str, Any] | None:
    return get_adapter(work.blobs, sha256) if sha256 is not None else None


def _determined_by(context: RoundContext, rows: RowFiles, counted: list[UpdateRecord]) -> list[object]:
    """What the server's step follows from, beside what its loop sees."""
    config = context.config
    return [
        config.strategy.model_dump(mode="json"),
        [config.seed, context.number],
        folder_identity(config.llm) if config.llm is not None else None,
        [config.llm_loading.model_dump(mode="json"), context.base_llm_adapter_sha256],
        [context.proxy_manifest_sha256, context.aggregated_adapter_sha256],
        [rows.training, context.probe_set_sha256],
        [context.base_message_sha256, context.base_server_state_sha256],
        [update.parts for update in counted],
    ]
