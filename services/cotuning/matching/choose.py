"""Which matching a name stands for. `fold` is ours; the others are what it is compared with."""

from dataclasses import replace
from functools import partial
from typing import TypedDict, get_args

import torch

from cotuning.alignment import Alignment, align
from cotuning.divergences import Divergence
from cotuning.encoding import EncodedBatch
from cotuning.folding import FoldPair
from cotuning.joint_loss import JointLoss, JointSide, joint_loss, joint_places
from cotuning.matching.gold import gold, match_vocabularies
from cotuning.matching.interface import Counts, Direction, Lesson, Matching, MatchingName, Reading, both_ways
from cotuning.matching.likelihood import span_likelihood
from cotuning.matching.mined import MinedDtw
from cotuning.matching.spans import count_spans
from cotuning.matching.uld import uld
from cotuning.mutual_loss import mutual_loss
from cotuning.token_tables import TokenTable


class _Compared(TypedDict):
    """How what is compared is compared."""

    temperature: float
    divergence: Divergence
    jsd_beta: float


def choose_matching(
    name: MatchingName,
    table_a: TokenTable,
    table_b: TokenTable,
    fold: FoldPair,
    *,
    temperature: float = 1.0,
    divergence: Divergence = "forward_kl",
    jsd_beta: float = 0.5,
    span_likelihood_weight: float = 0.0,
) -> Matching:
    """The matching of two models.

    Args:
        name: `fold` (`mutual_loss`), `ce_only` (neither learns from the other), `uld`, `gold`, `mined_dtw`, `alm`.
        table_a: of the first model's tokenizer.
        table_b: of the second's.
        fold: of the two, on the models' device.
        temperature: T; tau for the likelihood of spans.
        divergence: where the matching has one: `fold`, the matched ids of `gold`, the two events of `alm`.
        jsd_beta: for `jsd`.
        span_likelihood_weight: of the term on spans of several tokens beside `fold`; 0 is without.

    Raises:
        ValueError: an unknown name, a negative weight, or a weight beside another matching than `fold`.
    """
    if span_likelihood_weight and (name != "fold" or span_likelihood_weight < 0):
        raise ValueError(
            f"expected span_likelihood_weight 0 or, beside matching 'fold', above 0; got {span_likelihood_weight} "
            f"beside {name!r}"
        )
    compared: _Compared = {"temperature": temperature, "divergence": divergence, "jsd_beta": jsd_beta}
    if name == "fold":
        folded = Matching(partial(_fold, fold=fold, **compared), _count_fold)
        if not span_likelihood_weight:
            return folded
        inside = span_likelihood(**compared, spans="several_tokens", name="span_likelihood")
        return _with_term(folded, both_ways(inside, inside), weight=span_likelihood_weight)
    if name == "ce_only":
        return Matching(_nothing, lambda a, b: ())
    device = fold.map_a_V.device
    ways = ((table_a, table_b), (table_b, table_a))
    return both_ways(*(_direction(name, student, teacher, device, compared) for student, teacher in ways))


def _direction(
    name: MatchingName, student: TokenTable, teacher: TokenTable, device: torch.device, compared: _Compared
) -> Direction:
    """What a student learns from a teacher by a matching whose two directions are apart."""
    match name:
        case "uld":
            return uld(temperature=compared["temperature"])
        case "gold":
            return gold(match_vocabularies(student, teacher, device), **compared)
        case "mined_dtw":
            mined = MinedDtw(student, teacher, temperature=compared["temperature"])
            return Direction(mined, mined.count)
        case "alm":
            return span_likelihood(**compared)
    raise ValueError(f"expected a matching of {', '.join(get_args(MatchingName))}, got {name!r}")


def _fold(
    a: Reading,
    b: Reading,
    counts: Counts | None,
    *,
    fold: FoldPair,
    temperature: float,
    divergence: Divergence,
    jsd_beta: float,
) -> tuple[Lesson, Lesson]:
    """Both directions of `mutual_loss` at the starts of the common spans, in one pass; reported as `kl`.

    With the cross-entropies by `joint_loss`, where both sides ask for theirs and learn from each other. A side that
    does not is left to learn bit for bit as it would alone.
    """
    spans = align(a.batch, b.batch)
    compared: _Compared = {"temperature": temperature, "divergence": divergence, "jsd_beta": jsd_beta}
    num_spans = None if counts is None else max(counts[0], 1)
    if a.learns and b.learns and a.joint_weight is not None and b.joint_weight is not None:
        return _fold_with_tokens(a, b, spans, fold, num_spans=num_spans, compared=compared)
    losses = mutual_loss(
        a.hidden_BTD[spans.sample_S, spans.row_a_S],
        a.head,
        b.hidden_BTD[spans.sample_S, spans.row_b_S],
        b.head,
        fold,
        weight_a=1.0 if a.learns else None,
        weight_b=1.0 if b.learns else None,
        num_spans=num_spans,
        after_break_S=fold.after_break(spans),
        **compared,
    )
    return (
        Lesson({"kl": losses[0]}) if a.learns else Lesson(),
        Lesson({"kl": losses[1]}) if b.learns else Lesson(),
    )


def _fold_with_tokens(
    a: Reading, b: Reading, spans: Alignment, fold: FoldPair, *, num_spans: float | None, compared: _Compared
) -> tuple[Lesson, Lesson]:
    sides = []
    for reading, row_S in ((a, spans.row_a_S), (b, spans.row_b_S)):
        places = joint_places(reading.batch, spans.sample_S, row_S)
        hidden_ND = reading.hidden_BTD[places.sample_N, places.position_N]
        weight = 0.0 if reading.joint_weight is None else reading.joint_weight
        sides.append(JointSide(hidden_ND, reading.head, places.target_N, weight, reading.num_tokens))
    found = joint_loss(
        sides[0],
        sides[1],
        fold,
        spans.num_spans,
        num_spans=num_spans,
        after_break_S=fold.after_break(spans),
        **compared,
    )
    return _joint_lesson(found[0]), _joint_lesson(found[1])


def _joint_lesson(found: JointLoss) -> Lesson:
    metrics = {"ce": found.cross_entropy}
    if found.divergence is not None:
        metrics["kl"] = found.divergence
    return Lesson(metrics=metrics, joint=found.loss)


def _count_fold(a: EncodedBatch, b: EncodedBatch) -> Counts:
    return (count_spans(a, b),)


def _nothing(a: Reading, b: Reading, counts: Counts | None) -> tuple[Lesson, Lesson]:
    return Lesson(), Lesson()


def _with_term(folded: Matching, other: Matching, *, weight: float) -> Matching:
    """Both matchings' terms, those of the other at `weight`."""

    def teach(a: Reading, b: Reading, counts: Counts | None) -> tuple[Lesson, Lesson]:
        first, second = (None, None) if counts is None else (counts[:1], counts[1:])
        joined = [
            replace(one, terms={**one.terms, **two.terms}, weights={**one.weights, **dict.fromkeys(two.terms, weight)})
            for one, two in zip(folded(a, b, first), other(a, b, second), strict=True)
        ]
        return joined[0], joined[1]

    return Matching(teach, lambda a, b: (*folded.count(a, b), *other.count(a, b)))
