"""Measures a round's candidate and decides whether devices will start from it (docs/method.md, step 6)."""

import time

from sqlalchemy.orm import Session

from cotuning.adapters import AdapterState
from cotuning.strategies.promotion import candidates, not_worse
from persistence import results, rounds, versions
from persistence.clock import database_now
from persistence.rounds import RoundContext
from protocol.runs import Scores
from protocol.statuses import RoundStatus
from worker.adapter_files import get_adapter
from worker.round_metrics import grown
from worker.round_models import load_round_models
from worker.row_files import RowFiles, get_rows
from worker.scoring import ModelScores, score
from worker.stage import Finish, Work


def evaluate_round(work: Work) -> Finish:
    """Measure the candidate on public validation rows, in the last round also on the run's evaluation data.

    It is promoted if neither the LLM nor the shared small model needs over `tolerance_bits_per_byte` more than in the
    version that the round started from. Where there is no such model, or the run has no public rows, nothing can be
    measured here, and every round is promoted.
    """
    start = time.perf_counter()
    assert work.job.round_id is not None
    validation: ModelScores = {}
    test: ModelScores = {}
    promoted = True
    with work.database.reading() as session:
        context = rounds.get_context(session, work.job.round_id)
        rows = RowFiles.of(versions.get_version(session, context.run_id, 0))
        base = versions.get_version(session, context.run_id, context.base_version)
    if rows is not None:
        validation, test = _measure(work, context, rows)
        reference = {name: Scores.model_validate(each) for name, each in base.metrics["validation"].items()}
        promoted = not_worse(validation, reference, context.config.evaluation.tolerance_bits_per_byte)
    metrics = grown(
        context,
        RoundStatus.EVALUATING,
        time.perf_counter() - start,
        validation=validation,
        test=test,
        promoted=promoted,
    )

    def finish(session: Session) -> None:
        results.finish_evaluation(session, work.job, work.owner, metrics, promoted, database_now(session))

    return finish


def _measure(work: Work, context: RoundContext, rows: RowFiles) -> tuple[ModelScores, ModelScores]:
    config = context.config
    with work.lease.long_call("loading the models"):
        loaded = load_round_models(work, context)
    last = context.number == config.rounds
    with candidates(
        config.strategy,
        llm=loaded.llm,
        shared_model=loaded.shared_model,
        shared_adapter=_adapter(work, context.candidate_adapter_sha256),
        llm_adapter=_adapter(work, context.candidate_llm_adapter_sha256),
    ) as models:
        validation = score(models, get_rows(work.blobs, rows.validation), config, work.lease)
        test_rows = get_rows(work.blobs, rows.test) if last and rows.test else []
        return validation, score(models, test_rows, config, work.lease)


def _adapter(work: Work, sha256: str | None) -> AdapterState | None:
    return get_adapter(work.blobs, sha256) if sha256 is not None else None
