"""Measures the LLM and the proxy, as they stand, on the run's held-out rows."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial

from cotuning.evaluation import evaluate
from cotuning.examples import Example
from cotuning.language_model import LanguageModel
from protocol.runs import RunCreate, Scores
from worker.leases import Lease

ModelScores = dict[str, Scores]
"""Model name (`llm`, `proxy`) -> what was measured."""

BATCH_FACTOR = 4
"""Rows evaluated at a time, in training batches: without gradients so many fit where one was trained."""


def score(models: Mapping[str, LanguageModel], rows: Sequence[Example], config: RunCreate, lease: Lease) -> ModelScores:
    """Measure each model on `rows`; nothing for no rows.

    Raises:
        Abandoned: from the lease, between two tokens.
    """
    reading = config.strategy.server_steps or config.strategy.training
    scores: ModelScores = {}
    for name, lm in models.items() if rows else ():
        lease.check()
        measured = evaluate(
            lm,
            rows,
            max_new_tokens=config.evaluation.max_new_tokens,
            batch_size=BATCH_FACTOR * reading.batch_size,
            max_length=reading.max_length,
            on_rows=partial(_note, lease, f"evaluation_{name}"),
        )
        scores[name] = Scores.model_validate(dataclasses.asdict(measured))
    return scores


def _note(lease: Lease, stage: str, done: int, total: int) -> None:
    lease.on_progress(stage, done, total, {})


def not_worse(candidate: ModelScores, reference: ModelScores, tolerance: float) -> bool:
    """Whether no model of `candidate` needs over `tolerance` bits a byte more than the same one of `reference`."""
    return all(scores.bits_per_byte <= reference[name].bits_per_byte + tolerance for name, scores in candidate.items())


def as_json(scores: ModelScores) -> dict[str, dict[str, float]]:
    """The scores as metrics hold them."""
    return {name: each.model_dump() for name, each in scores.items()}
