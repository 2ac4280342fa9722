"""Measures the LLM and the proxy, as they stand, on the run's held-out rows."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial

from cotuning.evaluation import evaluate
from cotuning.examples import Example
from cotuning.language_model import LanguageModel
from cotuning.strategies.promotion import reading
from protocol.runs import RunCreate, Scores
from worker.leases import Lease

ModelScores = dict[str, Scores]
"""Model name (`llm`, `proxy`) -> what was measured."""


def score(models: Mapping[str, LanguageModel], rows: Sequence[Example], config: RunCreate, lease: Lease) -> ModelScores:
    """Measure each model on `rows`; nothing for no rows.

    Raises:
        Abandoned: from the lease, between two tokens.
    """
    scores: ModelScores = {}
    for name, lm in models.items() if rows else ():
        lease.check()
        measured = evaluate(
            lm,
            rows,
            max_new_tokens=config.evaluation.max_new_tokens,
            **reading(config.strategy),
            on_rows=partial(_note, lease, f"evaluation_{name}"),
        )
        scores[name] = Scores.model_validate(dataclasses.asdict(measured))
    return scores


def _note(lease: Lease, stage: str, done: int, total: int) -> None:
    lease.on_progress(stage, done, total, {})


def as_json(scores: ModelScores) -> dict[str, dict[str, float]]:
    """The scores as metrics hold them."""
    return {name: each.model_dump() for name, each in scores.items()}
