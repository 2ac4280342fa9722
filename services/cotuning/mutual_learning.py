"""Structure-agnostic mutual learning (SAML): two models read the same rows and teach each other.

Co-PLMs (arXiv 2511.11678): `L_a = CE_a + w_a T^2 D(sg p_b -> p_a)`, and the same with the sides swapped; two
optimizers, one data pass, the teacher's side detached. On a device: the proxy's shared adapter and the SLM's; in the
cloud: the proxy's and the LLM's, where received logits may teach as a third party. Which distributions are compared,
and how two vocabularies are, is a `matching`; the default, in `alignment`, `folding` and `mutual_loss`, is ours, not
the paper's.

Names: B rows, T tokens, S span starts, D hidden size.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from cotuning.adapters import adapter_parameters
from cotuning.checkpoints import Checkpoints
from cotuning.cross_entropy import cross_entropy, response_tokens
from cotuning.divergences import Divergence
from cotuning.encoding import EncodedBatch
from cotuning.gradient_checkpointing import recomputed_layers
from cotuning.heads import Head
from cotuning.language_model import LanguageModel, hidden_states, output_head
from cotuning.matching.choose import choose_matching
from cotuning.matching.interface import Counts, Lesson, Matching, MatchingName, Reading
from cotuning.mutual_loss import payload_loss
from cotuning.payload import PayloadRows, match_rows
from cotuning.seeding import derive_seed, isolated_generators
from cotuning.shared_rows import SharedRows
from cotuning.training import Learner, OnProgress, Precision, Step, autocast, micro_batches, train, training_mode


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
        learns: False: it only teaches, as it stands, without dropout; no adapter of its may require gradients.
    """

    name: str
    lm: LanguageModel
    adapter: str
    learning_rate: float
    divergence_weight: float
    teacher: Teacher | None = None
    learns: bool = True


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
    micro_batch_size: int | None = None,
    seed: int,
    stage: str,
    on_progress: OnProgress,
    checkpoints: Checkpoints | None = None,
) -> dict[str, float]:
    """Train one adapter of each party that learns, one step a batch, in place.

    Args:
        a: one party.
        b: the other.
        shared: from `shared_rows.share_rows`, in the same order of parties.
        temperature, divergence, jsd_beta, matching, span_likelihood_weight: see `choose_matching`.
        gradient_checkpointing: see there; of both models.
        micro_batch_size: rows of a step in memory at a time, all if not given. Without dropout it changes nothing but
            rounding: every mean is over the whole step.
        seed: of dropout.
        checkpoints: see `training.train`.

    Returns:
        Mean of the last tenth of the steps, nats: `<party>_ce` a token, `<party>_teacher_kl` a taught row, and before
        their weights the matching's terms: of `fold`, `<party>_kl` a span (the divergence times T^2).

    Raises:
        ValueError: see `choose_matching`.
        TrainingDiverged: see `training.train`.
    """
    side_a, side_b = (_Side(party, output_head(party.lm), precision) for party in (a, b))
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

    def step_at(step: int) -> Iterator[Step]:
        micro = micro_batches(shared.batches[step], micro_batch_size)
        return _mutual_step(side_a, side_b, shared, micro, match)

    learners = {party.name: _learner(party, weight_decay, gradient_clip) for party in (a, b) if party.learns}
    with (
        isolated_generators(derive_seed(seed, "dropout"), a.lm.device),
        _in_training(a, recomputed=gradient_checkpointing),
        _in_training(b, recomputed=gradient_checkpointing),
    ):
        return train(
            learners,
            step_at,
            steps=len(shared.batches),
            stage=stage,
            on_progress=on_progress,
            checkpoints=checkpoints,
        )


@contextmanager
def _in_training(party: Party, *, recomputed: bool) -> Iterator[None]:
    mode = training_mode(party.lm) if party.learns else nullcontext()
    with mode, recomputed_layers(party.lm, enabled=recomputed):
        yield


def _learner(party: Party, weight_decay: float, gradient_clip: float) -> Learner:
    parameters = list(adapter_parameters(party.lm, party.adapter).values())
    return Learner(parameters, party.learning_rate, weight_decay, gradient_clip)


def _mutual_step(
    side_a: "_Side", side_b: "_Side", shared: SharedRows, micro: Sequence[Sequence[int]], match: Matching
) -> Iterator[Step]:
    """Both objectives on each micro-batch, from one forward pass of each model."""
    parts = [_Part(indices, shared.rows_a.batch(indices), shared.rows_b.batch(indices)) for indices in micro]
    counts = _count(side_a, side_b, parts, match) if len(parts) > 1 else _Counts()
    for part in parts:
        yield _learn_part(side_a, side_b, part, match, counts)


def _learn_part(side_a: "_Side", side_b: "_Side", part: "_Part", match: Matching, counts: "_Counts") -> Step:
    with autocast(side_a.party.lm, side_a.precision):
        read_a, read_b = side_a.read(part.batch_a, counts.a), side_b.read(part.batch_b, counts.b)
        lesson_a, lesson_b = match(read_a, read_b, counts.matching)
        objective_a, report_a = side_a.objective(read_a, lesson_a, part.indices, counts.a)
        objective_b, report_b = side_b.objective(read_b, lesson_b, part.indices, counts.b)
    objectives = ((side_a.party, objective_a), (side_b.party, objective_b))
    return Step({party.name: each for party, each in objectives if party.learns}, report_a | report_b)


@dataclass(frozen=True)
class _Part:
    """A micro-batch: rows of a step, as each side reads them."""

    indices: Sequence[int]
    batch_a: EncodedBatch
    batch_b: EncodedBatch


class _SideCounts(NamedTuple):
    """What a side's own means are over: response tokens, and weights of what its teacher says. None: the batch's."""

    num_tokens: float | None = None
    num_taught: float | None = None


@dataclass(frozen=True)
class _Counts:
    """What every mean is over. None: what the batch itself has."""

    matching: Counts | None = None
    a: _SideCounts = field(default_factory=_SideCounts)
    b: _SideCounts = field(default_factory=_SideCounts)


def _count(side_a: "_Side", side_b: "_Side", parts: Sequence[_Part], match: Matching) -> _Counts:
    """What the means of a whole step are over; known from its rows alone."""

    def total(counts: Iterable[tuple[float, ...]]) -> tuple[float, ...]:
        return tuple(map(sum, zip(*counts, strict=True)))

    return _Counts(
        total(match.count(part.batch_a, part.batch_b) for part in parts),
        _SideCounts(*total(side_a.count(part.batch_a, part.indices) for part in parts)),
        _SideCounts(*total(side_b.count(part.batch_b, part.indices) for part in parts)),
    )


@dataclass(frozen=True)
class _Side:
    """A party with its head."""

    party: Party
    head: Head
    precision: Precision

    def count(self, batch: EncodedBatch, indices: Sequence[int]) -> tuple[float, float]:
        """Response tokens, and weights of what the teacher says."""
        taught = self._taught_rows(batch, indices)
        return len(response_tokens(batch).target_N), float(taught.weights_S.sum()) if taught else 0.0

    def read(self, batch: EncodedBatch, counts: _SideCounts) -> Reading:
        hidden_BTD = hidden_states(self.party.lm, batch.input_ids_BT)
        weight = self.party.divergence_weight if self.party.learns else 0.0
        return Reading(
            batch, hidden_BTD, self.head, learns=bool(weight), joint_weight=weight, num_tokens=counts.num_tokens
        )

    def objective(
        self, reading: Reading, lesson: Lesson, indices: Sequence[int], counts: _SideCounts
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy plus what the other model, and the teacher if there is one, add."""
        party, batch, hidden_BTD = self.party, reading.batch, reading.hidden_BTD
        report: dict[str, Tensor] = {}
        objective = lesson.joint
        if objective is None:
            tokens = response_tokens(batch)
            objective, _ = cross_entropy(
                hidden_BTD[tokens.sample_N, tokens.position_N],
                self.head,
                tokens.target_N,
                num_tokens=counts.num_tokens,
            )
            report[f"{party.name}_ce"] = objective.detach()
        learnt = lesson.loss()
        if learnt is not None:
            objective = objective + party.divergence_weight * learnt
        for name, value in [*lesson.terms.items(), *lesson.metrics.items()]:
            report[f"{party.name}_{name}"] = value.detach()
        if party.teacher is not None:
            taught = self._taught(party.teacher, reading, indices, counts.num_taught)
            if taught is not None:
                objective = objective + party.teacher.weight * taught
                report[f"{party.name}_teacher_kl"] = taught.detach()
        return objective, report

    def _taught(
        self, teacher: Teacher, reading: Reading, indices: Sequence[int], num_taught: float | None
    ) -> Tensor | None:
        """The teacher's term: a mean over taught positions, None if the batch has none."""
        rows = self._taught_rows(reading.batch, indices)
        if rows is None:
            return None
        return payload_loss(
            reading.hidden_BTD[rows.batch_row_S, rows.position_S],
            self.head,
            teacher.payload.take(rows.payload_row_S),
            weights_S=rows.weights_S,
            num_spans=float(rows.weights_S.sum()) if num_taught is None else num_taught,
        )

    def _taught_rows(self, batch: EncodedBatch, indices: Sequence[int]) -> "_TaughtRows | None":
        """Where the teacher speaks in a batch, None if nowhere."""
        teacher = self.party.teacher
        places = [place for place, index in enumerate(indices) if teacher and index in teacher.sample_of_row]
        if teacher is None or not places:
            return None
        places_R = torch.tensor(places, device=batch.input_ids_BT.device)
        samples_R = torch.tensor([teacher.sample_of_row[indices[place]] for place in places], device=places_R.device)
        match = match_rows(teacher.payload, _rows_of(batch, places_R), samples_R)
        if not len(match.payload_row_S):
            return None
        weights_S = teacher.weights_S[match.payload_row_S]
        return _TaughtRows(places_R[match.batch_row_S], match.position_S, match.payload_row_S, weights_S)


@dataclass(frozen=True)
class _TaughtRows:
    """Positions of a batch and the payload's rows that teach there, with their weights."""

    batch_row_S: Tensor
    position_S: Tensor
    payload_row_S: Tensor
    weights_S: Tensor


def _rows_of(batch: EncodedBatch, places_R: Tensor) -> EncodedBatch:
    """Some rows of a batch, padding kept."""
    return EncodedBatch(**{name: getattr(batch, name)[places_R] for name in batch.__dataclass_fields__})
