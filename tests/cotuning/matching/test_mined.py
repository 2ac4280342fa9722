"""MinED with DTW against loops over tokens, partners and ids."""

import math

import pytest
import torch
from torch import Tensor

from cotuning.matching.dtw import dtw_align
from cotuning.matching.interface import Reading
from cotuning.matching.mined import MinedDtw, distinct_softmax
from tests.cotuning.matching.readings import KIND_A, KIND_B, RESPONSES, pair, probs_before, tokens_of
from tests.cotuning.matching.test_edit_distance import slow_distance
from tests.cotuning.trained_tokenizers import table_of

TOP_K = 4


def nearest(index: int) -> int | None:
    """Side A's id nearest to side B's `index`, by search; the least of several."""
    a, b = table_of(KIND_A), table_of(KIND_B)
    piece = b.pieces[index]
    if piece is None:
        return a.end_id if index == b.end_id else None
    distances = [slow_distance(piece, other) if other else 10**6 for other in a.pieces]
    return distances.index(min(distances))


def slow_loss(student: Reading, teacher: Reading, temperature: float) -> tuple[float, int, int]:
    """The mean cross-entropy, how many tokens the teacher gave a distribution for, and how many there are."""
    losses, taught = [], 0
    for row, response in enumerate(RESPONSES):
        tokens, others = tokens_of(student, KIND_A, row, response), tokens_of(teacher, KIND_B, row, response)
        path = dtw_align([token.piece for token in tokens], [token.piece for token in others]).tolist()
        for place, token in enumerate(tokens):
            partners = [others[other] for mine, other in path if mine == place]
            target = {token.index: 1.0}
            if len(partners) == 1 and nearest(partners[0].index) == token.index:
                taught += 1
                target = {}
                probs = probs_before(teacher, row, partners[0], temperature)
                for index in sorted(range(len(probs)), key=lambda i: -probs[i])[:TOP_K]:
                    target.setdefault(nearest(index), probs[index])  # type: ignore[arg-type]
                total = sum(target.values())
                target = {index: mass / total for index, mass in target.items()}
            student_probs = probs_before(student, row, token, temperature)
            losses.append(-sum(mass * math.log(student_probs[index]) for index, mass in target.items()))
    return sum(losses) / len(losses), taught, len(losses)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_loss_is_the_loop_over_tokens(temperature: float) -> None:
    a, b = pair(scale=1.0)
    expected, taught, total = slow_loss(a, b, temperature)
    assert 0 < taught < total, "the case must have both kinds of targets"
    lesson = MinedDtw(table_of(KIND_A), table_of(KIND_B), temperature=temperature, top_k=TOP_K)(a, b)
    assert lesson.terms["mined"].item() == pytest.approx(expected, rel=1e-10)
    assert lesson.metrics["mined_share"].item() == pytest.approx(taught / total)


def test_a_second_batch_of_the_same_rows_is_the_same() -> None:
    """Paths and nearest pieces are kept between batches."""
    a, b = pair()
    direction = MinedDtw(table_of(KIND_A), table_of(KIND_B), temperature=1.0)
    first, second = direction(a, b), direction(a, b)
    assert torch.equal(first.terms["mined"], second.terms["mined"])


def test_distinct_softmax_counts_an_id_once_and_unknown_ones_never() -> None:
    """Kept are places 0 and 3, with logits 2 and 0: 1 / (1 + e^-2)."""
    ids, logits = torch.tensor([[5, 5, -1, 7], [-1, -1, -1, -1]]), torch.tensor([[2.0, 1.0, 0.5, 0.0], [3, 2, 1, 0]])
    got: Tensor = distinct_softmax(ids, logits)
    p = 1 / (1 + math.exp(-2))
    torch.testing.assert_close(got, torch.tensor([[p, 0, 0, 1 - p], [0, 0, 0, 0]]))
