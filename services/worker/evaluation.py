"""Measures a round's candidate and decides whether devices will start from it (docs/method.md, step 6)."""

import time

from sqlalchemy.orm import Session

from cotuning.adapters import adapted
from persistence import results, rounds, versions
from persistence.clock import database_now
from persistence.rounds import RoundContext
from protocol.runs import Scores
from protocol.statuses import RoundStatus
from protocol.strategies import CoPlmsSettings
from worker.adapter_files import get_adapter, peft_config
from worker.round_metrics import grown
from worker.row_files import RowFiles, get_rows
from worker.scoring import ModelScores, not_worse, score
from worker.stage import Finish, Work


def evaluate_round(work: Work) -> Finish:
    """Measure the candidate on public validation rows, in the last round also on the run's evaluation data.

    It is promoted if neither the LLM nor the proxy needs over `tolerance_bits_per_byte` more than in the version that
    the round started from. A strategy without a proxy has nothing to measure here: its rounds are always promoted.
    """
    start = time.perf_counter()
    assert work.job.round_id is not None
    validation: ModelScores = {}
    test: ModelScores = {}
    promoted = True
    with work.database.reading() as session:
        context = rounds.get_context(session, work.job.round_id)
        if isinstance(context.config.strategy, CoPlmsSettings):
            rows = RowFiles.of(versions.get_version(session, context.run_id, 0))
            base = versions.get_version(session, context.run_id, context.base_version)
    if isinstance(context.config.strategy, CoPlmsSettings):
        validation, test = _measure(work, context, context.config.strategy, rows)
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


def _measure(
    work: Work, context: RoundContext, settings: CoPlmsSettings, rows: RowFiles
) -> tuple[ModelScores, ModelScores]:
    config = context.config
    assert config.llm is not None
    assert context.proxy_manifest_sha256 is not None
    assert context.candidate_adapter_sha256 is not None
    assert context.candidate_llm_adapter_sha256 is not None
    with work.lease.long_call("loading the models"):
        llm = work.cache.llm(config.llm, config.llm_loading)
        proxy = work.cache.proxy(context.proxy_manifest_sha256)
    omega = get_adapter(work.blobs, context.candidate_llm_adapter_sha256)
    theta = get_adapter(work.blobs, context.candidate_adapter_sha256)
    last = context.number == config.rounds
    with (
        adapted(llm, peft_config(llm, settings.llm_lora), {"llm": omega}) as tuned_llm,
        adapted(proxy, peft_config(proxy, settings.proxy_lora), {"shared": theta}) as tuned_proxy,
    ):
        models = {"llm": tuned_llm, "proxy": tuned_proxy}
        validation = score(models, get_rows(work.blobs, rows.validation), config, work.lease)
        test_rows = get_rows(work.blobs, rows.test) if last and rows.test else []
        return validation, score(models, test_rows, config, work.lease)
