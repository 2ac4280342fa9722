"""One model learns from received logits: `lambda CE + (1 - lambda) lesson` (FedMKT, arXiv 2406.02224)."""

from collections.abc import Iterator, Sequence

from cotuning.cross_entropy import cross_entropy, response_tokens
from cotuning.encoded_rows import EncodedRows
from cotuning.encoding import EncodedBatch
from cotuning.language_model import LanguageModel, hidden_states, output_head
from cotuning.received_logits import Lessons
from cotuning.training import Precision, Step, autocast, micro_batches
from cotuning.tuning import StepAt, cross_entropy_steps


def transfer_steps(
    lm: LanguageModel,
    name: str,
    rows: EncodedRows,
    batches: Sequence[Sequence[int]],
    lessons: Lessons,
    *,
    ce_weight: float,
    precision: Precision = "float32",
    micro_batch_size: int | None = None,
) -> StepAt:
    """Each step's objective for the learner `name`; both terms are means over the step, from one forward pass.

    The lessons are constants: received distributions, aligned before training. With a `ce_weight` of 1 the objective
    is the cross-entropy alone, bit for bit.

    Args:
        lm: the student, with its adapter on.
        name: of the adapter.
        rows: the probe set as the student reads it.
        batches: indices of the probe rows of each step.
        lessons: from `received_logits.make_lessons`, of the same rows.
        ce_weight: lambda.
        precision: of the forward pass.
        micro_batch_size: rows of a step in memory at a time, all if not given.

    Raises:
        ValueError: a weight outside 0..1.
    """
    if not 0 <= ce_weight <= 1:
        raise ValueError(f"expected a weight of the cross-entropy in 0..1, got {ce_weight}")
    if ce_weight == 1:
        return cross_entropy_steps(lm, name, rows, batches, precision=precision, micro_batch_size=micro_batch_size)
    rows.encode(index for batch in batches for index in batch)
    head = output_head(lm)

    def learn(indices: Sequence[int], batch: EncodedBatch, num_tokens: int, num_taught: int) -> Step:
        tokens = response_tokens(batch)
        with autocast(lm, precision):
            hidden_BTD = hidden_states(lm, batch.input_ids_BT)
            hidden_ND = hidden_BTD[tokens.sample_N, tokens.position_N]
            loss, _ = cross_entropy(hidden_ND, head, tokens.target_N, num_tokens=num_tokens)
            taught = lessons.loss(indices, batch, hidden_BTD, head, count=num_taught)
        objective, report = ce_weight * loss, {"cross_entropy": loss.detach()}
        if taught is not None:
            objective = objective + (1 - ce_weight) * taught
            report[lessons.name] = taught.detach()
        return Step({name: objective}, report)

    def step_at(step: int) -> Iterator[Step]:
        micro = micro_batches(batches[step], micro_batch_size)
        parts = [(indices, rows.batch(indices)) for indices in micro]
        num_tokens = sum(len(response_tokens(batch).target_N) for _, batch in parts)
        num_taught = sum(lessons.count(indices, batch) for indices, batch in parts)
        for indices, batch in parts:
            yield learn(indices, batch, num_tokens, num_taught)

    return step_at
