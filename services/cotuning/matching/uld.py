"""Universal Logit Distillation (ULD, arXiv 2402.12030): sorted probabilities, position by position.

    loss = mean over pairs of positions of  sum_r |p_s^(r) - p_t^(r)|,   p^(r) the r-th greatest probability

The k-th response token of one side is compared with the k-th of the other, up to the shorter response, whatever they
stand for; at each position the two distributions are sorted and compared by L1, which is the Wasserstein distance when
every move between two different ids costs the same. Without an alignment of tokens or of vocabularies: the plainest
rival. Differs from the paper in that both models learn, that END is one more position, and that the mean is over all
positions of the batch. Temperature softens both sides; an L1 distance is not multiplied by T^2.

Names: N pairs of positions, V and W token ids of the two sides.
"""

from torch import Tensor
from torch.nn import functional

from cotuning.cross_entropy import ResponseTokens, response_tokens
from cotuning.encoding import EncodedBatch
from cotuning.matching.interface import Direction, Lesson, Reading, by_rows, log_probs, mean


def sorted_l1(student_probs_NV: Tensor, teacher_probs_NW: Tensor) -> Tensor:
    """Sum over ranks of |student - teacher| after sorting each row, the narrower one padded with zeros; [N]."""
    width = max(student_probs_NV.shape[1], teacher_probs_NW.shape[1])
    student_NW, teacher_NW = (
        functional.pad(probs.sort(1, descending=True).values, (0, width - probs.shape[1]))
        for probs in (student_probs_NV, teacher_probs_NW)
    )
    return (student_NW - teacher_NW).abs().sum(1)


def uld(*, temperature: float) -> Direction:
    """The direction `mean_k sorted_l1(p_student, sg p_teacher)` over pairs of positions; reported as `uld`."""

    def teach(student: Reading, teacher: Reading, num_pairs: float | None) -> Lesson:
        student_tokens, teacher_tokens = position_pairs(student.batch, teacher.batch)

        def values(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
            return sorted_l1(
                log_probs(student_ND, student.head, temperature).exp(),
                log_probs(teacher_ND, teacher.head, temperature).exp(),
            )

        values_N = by_rows(
            values,
            student.hidden_BTD[student_tokens.sample_N, student_tokens.position_N],
            teacher.hidden_BTD[teacher_tokens.sample_N, teacher_tokens.position_N],
        )
        return Lesson({"uld": mean(values_N, num_pairs)})

    def count(student: EncodedBatch, teacher: EncodedBatch) -> int:
        return len(position_pairs(student, teacher)[0].target_N)

    return Direction(teach, count)


def position_pairs(a: EncodedBatch, b: EncodedBatch) -> tuple[ResponseTokens, ResponseTokens]:
    """The k-th response tokens of both sides, END included, of each row up to the shorter side."""
    tokens_a, tokens_b = response_tokens(a), response_tokens(b)
    counts_aB, counts_bB = (tokens.sample_N.bincount(minlength=len(a.digest_B)) for tokens in (tokens_a, tokens_b))
    shorter_B = counts_aB.minimum(counts_bB)
    return _first_tokens(tokens_a, counts_aB, shorter_B), _first_tokens(tokens_b, counts_bB, shorter_B)


def _first_tokens(tokens: ResponseTokens, counts_B: Tensor, kept_B: Tensor) -> ResponseTokens:
    """The first `kept_B` tokens of each row."""
    first_B = counts_B.cumsum(0) - counts_B
    rank_N = tokens.sample_N.new_ones(len(tokens.sample_N)).cumsum(0) - 1 - first_B[tokens.sample_N]
    kept_N = rank_N < kept_B[tokens.sample_N]
    return ResponseTokens(tokens.sample_N[kept_N], tokens.position_N[kept_N], tokens.target_N[kept_N])
