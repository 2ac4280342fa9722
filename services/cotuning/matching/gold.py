"""General Online Logit Distillation's hybrid loss (GOLD; described with its reference implementation, TRL's
`trl.experimental.gold`): spans of the same text, a divergence on the tokens that both vocabularies have, sorted
probabilities on the rest.

For a span of several tokens the distribution at its *last* token is multiplied by the probabilities of the earlier
tokens that were read (the chain rule): `r(v) = p(v | prefix, t_1 .. t_{n-1}) * p(t_1) .. p(t_{n-1})`. That is the joint
probability of the span's text with v in the place of its last token, so r does not sum to one and what is called a
divergence of it can be negative; the loss is the published one all the same. M are the ids that both sides have:

    loss = mean over spans of  w D(r_t[M] || r_s[M]) + (1 - w) |sort r_s[not M] - sort r_t[not M]|_1

and w = |M| / V_teacher unless it is given. Every distribution is read at the position *before* the token that it
predicts; TRL's default (`observed`) reads it one too late and merges by the first token (TRL issue 5152), its
`bayesian` strategy is what is computed here.

Differs from TRL: tokens are the same if their *bytes* are, not their vocabulary strings, and the two ends of turn are
the same token; END is one more span; what follows the last common boundary is dropped, not glued together; no floor
under probabilities; the mean is over all spans of the batch. As there, T^2 does not enter.

Names: S spans, M matched ids, U and W unmatched ones of the two sides, V token ids.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from cotuning.alignment import align
from cotuning.divergences import Divergence, divergence_and_slope
from cotuning.matching.interface import Direction, Lesson, Reading, by_rows, log_probs, mean
from cotuning.matching.spans import count_spans, span_tokens, sum_by_span, token_log_likelihoods
from cotuning.matching.uld import sorted_l1
from cotuning.token_tables import TokenTable


@dataclass(frozen=True)
class VocabularyMatch:
    """Which ids of two vocabularies stand for the same bytes.

    Attributes:
        student_M, teacher_M: the matched ids, pairwise.
        student_U: the student's other ids.
        teacher_W: the teacher's.
    """

    student_M: Tensor
    teacher_M: Tensor
    student_U: Tensor
    teacher_W: Tensor

    @property
    def share(self) -> float:
        """Share of the teacher's ids that are matched: TRL's weight of the matched part."""
        return len(self.teacher_M) / (len(self.teacher_M) + len(self.teacher_W))


def match_vocabularies(student: TokenTable, teacher: TokenTable, device: torch.device | str = "cpu") -> VocabularyMatch:
    """Pair ids of equal bytes (the least of each side where it has several) and the two ends of turn."""
    ids_s, ids_t = _id_of_piece(student), _id_of_piece(teacher)
    shared = sorted(ids_s.keys() & ids_t.keys())
    matched_s = [*(ids_s[piece] for piece in shared), student.end_id]
    matched_t = [*(ids_t[piece] for piece in shared), teacher.end_id]
    return VocabularyMatch(
        student_M=torch.tensor(matched_s, device=device),
        teacher_M=torch.tensor(matched_t, device=device),
        student_U=_others(student, matched_s, device),
        teacher_W=_others(teacher, matched_t, device),
    )


def _id_of_piece(table: TokenTable) -> dict[bytes, int]:
    return {piece: index for index, piece in reversed(list(enumerate(table.pieces))) if piece}


def _others(table: TokenTable, matched: list[int], device: torch.device | str) -> Tensor:
    other_V = torch.ones(table.num_tokens, dtype=torch.bool)
    other_V[matched] = False
    return other_V.nonzero().flatten().to(device)


def hybrid_values(
    student_logs_SV: Tensor,
    teacher_logs_SV: Tensor,
    vocabularies: VocabularyMatch,
    *,
    divergence: Divergence = "jsd",
    jsd_beta: float = 0.5,
    matched_weight: float | None = None,
) -> Tensor:
    """The hybrid loss of each span, [S], from merged log-probabilities of both sides.

    Args:
        student_logs_SV: log r_s over the student's ids.
        teacher_logs_SV: log r_t over the teacher's ids, constants.
        vocabularies: which ids are the same.
        divergence: on the matched ids, teacher to student; TRL: JSD.
        jsd_beta: for `jsd`.
        matched_weight: w; `vocabularies.share` if not given.
    """
    weight = vocabularies.share if matched_weight is None else matched_weight
    matched_S, _ = divergence_and_slope(
        teacher_logs_SV[:, vocabularies.teacher_M],
        student_logs_SV[:, vocabularies.student_M],
        divergence,
        jsd_beta,
        slope=False,
    )
    if not (len(vocabularies.student_U) and len(vocabularies.teacher_W)):
        return weight * matched_S
    unmatched_S = sorted_l1(
        student_logs_SV[:, vocabularies.student_U].exp(), teacher_logs_SV[:, vocabularies.teacher_W].exp()
    )
    return weight * matched_S + (1 - weight) * unmatched_S


def gold(
    vocabularies: VocabularyMatch,
    *,
    temperature: float,
    divergence: Divergence = "jsd",
    jsd_beta: float = 0.5,
    matched_weight: float | None = None,
) -> Direction:
    """The direction; the mean of `hybrid_values` over spans, reported as `gold`."""
    compare = partial(
        hybrid_values,
        vocabularies=vocabularies,
        divergence=divergence,
        jsd_beta=jsd_beta,
        matched_weight=matched_weight,
    )

    def teach(student: Reading, teacher: Reading, num_spans: float | None) -> Lesson:
        alignment = align(student.batch, teacher.batch)
        sides = []
        for reading in (student, teacher):
            tokens = span_tokens(reading.batch, alignment)
            # In the order of spans, because tokens are ordered by row and position as spans are.
            last, earlier = tokens.take(tokens.is_last_N), tokens.take(~tokens.is_last_N)
            earlier_S = sum_by_span(token_log_likelihoods(reading, earlier, temperature), earlier)
            sides += [reading.hidden_BTD[last.sample_N, last.position_N], earlier_S]

        def values(student_SD: Tensor, student_S: Tensor, teacher_SD: Tensor, teacher_S: Tensor) -> Tensor:
            return compare(
                log_probs(student_SD, student.head, temperature) + student_S[:, None],
                log_probs(teacher_SD, teacher.head, temperature) + teacher_S[:, None],
            )

        return Lesson({"gold": mean(by_rows(values, *sides), num_spans)})

    return Direction(teach, count_spans)
