"""Structure-agnostic mutual learning (SAML): two models read the same rows and teach each other.

Co-PLMs (arXiv 2511.11678): `L_a = CE_a + w_a T^2 D(sg p_b -> p_a)`, and the same with the sides swapped; two
optimizers, one data pass, the teacher's side detached. On a device: the proxy's shared adapter and the SLM's; in the
cloud: the proxy's and the LLM's, where received logits may teach as a third party. Which distributions are compared,
and how two vocabularies are, is a `matching`; the default, in `alignment`, `folding` and `mutual_loss`, is ours, not
the paper's.

Names: B rows, T tokens, S span starts, D hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cotuning.adapters import adapter_parameters
from cotuning.alignment import align
from cotuning.checkpoints import Checkpoints
from cotuning.cross_entropy import cross_entropy, response_tokens
from cotuning.divergences import Divergence
from cotuning.encoded_rows import EncodedRows
from cotuning.encoding import EncodedBatch
from cotuning.folding import FoldPair, class_agreement, fold_pair
from cotuning.gradient_checkpointing import recomputed_layers
from cotuning.heads import Head
from cotuning.language_model import LanguageModel, hidden_states, output_head
from cotuning.matching.choose import choose_matching
from cotuning.matching.interface import Lesson, Matching, MatchingName, Reading
from cotuning.mutual_loss import payload_loss
from cotuning.payload import PayloadRows, match_rows
from cotuning.seeding import derive_seed, isolated_generators
from cotuning.training import Learner, OnProgress, Precision, Step, autocast, train, training_mode

_MEASURED_AT_ONCE = 64


class CoverageTooLow(ValueError):
    """The two tokenizations cannot be aligned well enough to learn from.

    Attributes:
        measure: `coverage` or `class_agreement`.
        expected, received: the least accepted share and the measured one.
    """

    def __init__(self, measure: str, expected: float, received: float) -> None:
        super().__init__(
            f"alignment {measure}: expected at least {expected:.3f}, got {received:.3f}; nothing was trained"
        )
        self.measure = measure
        self.expected = expected
        self.received = received


@dataclass(frozen=True)
class AlignmentStats:
    """How well two tokenizations of the training rows could be aligned.

    Attributes:
        coverage: share of response bytes inside spans; rows that could not be aligned count as uncovered.
        class_agreement: share of text spans whose observed first tokens fall in the same class.
        num_spans: span starts, END included.
        skipped_rows: rows that keep only their cross-entropy.
    """

    coverage: float
    class_agreement: float
    num_spans: int
    skipped_rows: int


@dataclass(frozen=True)
class Teacher:
    """Received logits that teach one party on some of the rows.

    Attributes:
        payload: rows sorted by sample; over the party's own token ids. Several teachers of a sample are several rows.
        weights_S: of each payload row.
        sample_of_row: index of the training row -> sample of the payload, for rows that are taught.
        weight: of the term in the party's objective.
    """

    payload: PayloadRows
    weights_S: Tensor
    sample_of_row: dict[int, int]
    weight: float


@dataclass(frozen=True)
class Party:
    """One of the two models.

    Attributes:
        name: of the party in reports, for example `proxy`.
        lm: with its adapters on and activated.
        adapter: the one that learns.
        learning_rate: of its optimizer.
        divergence_weight: of what it learns from the other; 0 switches that off.
        teacher: a third party's logits.
    """

    name: str
    lm: LanguageModel
    adapter: str
    learning_rate: float
    divergence_weight: float
    teacher: Teacher | None = None


@dataclass(frozen=True)
class SharedRows:
    """What both parties read, each with its own tokenizer.

    Attributes:
        rows_a, rows_b: the same examples.
        batches: indices of the rows of each step.
        fold: of the two vocabularies.
        alignment: of all rows in `batches`.
    """

    rows_a: EncodedRows
    rows_b: EncodedRows
    batches: Sequence[Sequence[int]]
    fold: FoldPair
    alignment: AlignmentStats


def share_rows(
    rows_a: EncodedRows, rows_b: EncodedRows, batches: Sequence[Sequence[int]], *, min_coverage: float
) -> SharedRows:
    """Align the rows that will be drawn, and refuse to train on garbage.

    Raises:
        CoverageTooLow: coverage or class agreement is below `min_coverage`.
    """
    a, b = rows_a.lm, rows_b.lm
    fold = fold_pair(a.tokenizer, a.table, b.tokenizer, b.table).to(a.device)
    used = sorted({index for batch in batches for index in batch})
    stats = measure_alignment(rows_a, rows_b, fold, used)
    for measure in ("coverage", "class_agreement"):
        value = getattr(stats, measure)
        if value < min_coverage:
            raise CoverageTooLow(measure, min_coverage, value)
    return SharedRows(rows_a, rows_b, batches, fold, stats)


def measure_alignment(a: EncodedRows, b: EncodedRows, fold: FoldPair, indices: Sequence[int]) -> AlignmentStats:
    """Align the rows at `indices` and report how well that went."""
    covered = total = spans = text_spans = skipped = 0
    agreeing = 0.0
    a.encode(indices)
    b.encode(indices)
    for start in range(0, len(indices), _MEASURED_AT_ONCE):
        chunk = indices[start : start + _MEASURED_AT_ONCE]
        alignment = align(a.batch(chunk), b.batch(chunk))
        num_text = int((~alignment.is_end_S).sum())
        covered += int(alignment.covered_bytes)
        total += int(alignment.total_bytes)
        spans += alignment.num_spans
        skipped += alignment.num_skipped
        agreeing += class_agreement(alignment, fold) * num_text
        text_spans += num_text
    return AlignmentStats(
        coverage=covered / total if total else 1.0,
        class_agreement=agreeing / text_spans if text_spans else 1.0,
        num_spans=spans,
        skipped_rows=skipped,
    )


def learn_mutually(
    a: Party,
    b: Party,
    shared: SharedRows,
    *,
    weight_decay: float = 0.0,
    gradient_clip: float = 1.0,
    temperature: float = 1.0,
    divergence: Divergence = "forward_kl",
    jsd_beta: float = 0.5,
    matching: MatchingName = "fold",
    span_likelihood_weight: float = 0.0,
    precision: Precision = "float32",
    gradient_checkpointing: bool = False,
    seed: int,
    stage: str,
    on_progress: OnProgress,
    checkpoints: Checkpoints | None = None,
) -> dict[str, float]:
    """Train one adapter of each party, one step a batch, in place.

    Args:
        a: one party.
        b: the other.
        shared: from `share_rows`, in the same order of parties.
        temperature, divergence, jsd_beta, matching, span_likelihood_weight: see `choose_matching`.
        gradient_checkpointing: see there; of both models.
        seed: of dropout.
        checkpoints: see `training.train`.

    Returns:
        Mean of the last tenth of the steps, nats: `<party>_ce` a token, `<party>_teacher_kl` a taught row, and before
        their weights the matching's terms: of `fold`, `<party>_kl` a span (the divergence times T^2).

    Raises:
        ValueError: see `choose_matching`.
        TrainingDiverged: see `training.train`.
    """
    side_a, side_b = _Side(a, output_head(a.lm)), _Side(b, output_head(b.lm))
    match = choose_matching(
        matching,
        a.lm.table,
        b.lm.table,
        shared.fold,
        temperature=temperature,
        divergence=divergence,
        jsd_beta=jsd_beta,
        span_likelihood_weight=span_likelihood_weight,
    )

    def step_at(step: int) -> Step:
        with autocast(a.lm, precision):
            return _mutual_step(side_a, side_b, shared, shared.batches[step], match)

    learners = {party.name: _learner(party, weight_decay, gradient_clip) for party in (a, b)}
    with (
        isolated_generators(derive_seed(seed, "dropout"), a.lm.device),
        training_mode(a.lm),
        training_mode(b.lm),
        recomputed_layers(a.lm, enabled=gradient_checkpointing),
        recomputed_layers(b.lm, enabled=gradient_checkpointing),
    ):
        return train(
            learners,
            step_at,
            steps=len(shared.batches),
            stage=stage,
            on_progress=on_progress,
            checkpoints=checkpoints,
        )


def _learner(party: Party, weight_decay: float, gradient_clip: float) -> Learner:
    parameters = list(adapter_parameters(party.lm, party.adapter).values())
    return Learner(parameters, party.learning_rate, weight_decay, gradient_clip)


def _mutual_step(side_a: "_Side", side_b: "_Side", shared: SharedRows, indices: Sequence[int], match: Matching) -> Step:
    """Both objectives on one batch, from one forward pass of each model."""
    read_a, read_b = side_a.read(shared.rows_a.batch(indices)), side_b.read(shared.rows_b.batch(indices))
    lesson_a, lesson_b = match(read_a, read_b)
    objective_a, report_a = side_a.objective(read_a, lesson_a, indices)
    objective_b, report_b = side_b.objective(read_b, lesson_b, indices)
    return Step({side_a.party.name: objective_a, side_b.party.name: objective_b}, report_a | report_b)


@dataclass(frozen=True)
class _Side:
    """A party with its head."""

    party: Party
    head: Head

    def read(self, batch: EncodedBatch) -> Reading:
        hidden_BTD = hidden_states(self.party.lm, batch.input_ids_BT)
        weight = self.party.divergence_weight
        return Reading(batch, hidden_BTD, self.head, learns=bool(weight), joint_weight=weight)

    def objective(self, reading: Reading, lesson: Lesson, indices: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy plus what the other model, and the teacher if there is one, add."""
        party, batch, hidden_BTD = self.party, reading.batch, reading.hidden_BTD
        report: dict[str, Tensor] = {}
        objective = lesson.joint
        if objective is None:
            tokens = response_tokens(batch)
            objective, _ = cross_entropy(hidden_BTD[tokens.sample_N, tokens.position_N], self.head, tokens.target_N)
            report[f"{party.name}_ce"] = objective.detach()
        learnt = lesson.loss()
        if learnt is not None:
            objective = objective + party.divergence_weight * learnt
        for name, value in [*lesson.terms.items(), *lesson.metrics.items()]:
            report[f"{party.name}_{name}"] = value.detach()
        if party.teacher is not None:
            taught = self._taught(party.teacher, batch, hidden_BTD, indices)
            if taught is not None:
                objective = objective + party.teacher.weight * taught
                report[f"{party.name}_teacher_kl"] = taught.detach()
        return objective, report

    def _taught(
        self, teacher: Teacher, batch: EncodedBatch, hidden_BTD: Tensor, indices: Sequence[int]
    ) -> Tensor | None:
        """The teacher's term: a mean over taught positions, None if the batch has none."""
        places = [place for place, index in enumerate(indices) if index in teacher.sample_of_row]
        if not places:
            return None
        places_R = torch.tensor(places, device=hidden_BTD.device)
        samples_R = torch.tensor([teacher.sample_of_row[indices[place]] for place in places], device=places_R.device)
        match = match_rows(teacher.payload, _rows_of(batch, places_R), samples_R)
        if not len(match.payload_row_S):
            return None
        weights_S = teacher.weights_S[match.payload_row_S]
        return payload_loss(
            hidden_BTD[places_R[match.batch_row_S], match.position_S],
            self.head,
            teacher.payload.take(match.payload_row_S),
            weights_S=weights_S,
            num_spans=float(weights_S.sum()),
        )


def _rows_of(batch: EncodedBatch, places_R: Tensor) -> EncodedBatch:
    """Some rows of a batch, padding kept."""
    return EncodedBatch(**{name: getattr(batch, name)[places_R] for name in batch.__dataclass_fields__})
