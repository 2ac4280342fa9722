"""GOLD's hybrid loss against a loop over spans, tokens and ids."""

import math

import pytest
import torch

from cotuning.divergences import Divergence
from cotuning.matching.gold import VocabularyMatch, gold, hybrid_values, match_vocabularies
from cotuning.matching.interface import Reading
from tests.cotuning.matching.readings import KIND_A, KIND_B, Token, pair, probs_before, span_groups
from tests.cotuning.matching.test_uld import slow_sorted_l1
from tests.cotuning.test_mutual_loss import slow_divergence
from tests.cotuning.trained_tokenizers import table_of


def merged(one: Reading, row: int, group: list[Token], temperature: float) -> list[float]:
    """The last token's distribution, times the probabilities of the earlier tokens."""
    factor = 1.0
    for token in group[:-1]:
        factor *= probs_before(one, row, token, temperature)[token.index]
    return [factor * p for p in probs_before(one, row, group[-1], temperature)]


def same_ids() -> tuple[list[tuple[int, int]], list[int], list[int]]:
    """Pairs of ids with equal bytes or both END, and each side's rest; each id in one pair at most."""
    a, b = table_of(KIND_A), table_of(KIND_B)
    pairs, used_b = [(a.end_id, b.end_id)], {b.end_id}
    seen = set()
    for index, piece in enumerate(a.pieces):
        found = [other for other, their in enumerate(b.pieces) if piece and their == piece]
        if found and piece not in seen:
            seen.add(piece)
            pairs.append((index, found[0]))
            used_b.add(found[0])
    used_a = {index for index, _ in pairs}
    return (
        pairs,
        [index for index in range(a.num_tokens) if index not in used_a],
        [index for index in range(b.num_tokens) if index not in used_b],
    )


@pytest.mark.parametrize(
    ("divergence", "temperature", "weight"),
    [("jsd", 1.0, None), ("forward_kl", 2.0, None), ("reverse_kl", 1.0, 0.75)],
)
def test_the_loss_is_the_loop_over_spans(divergence: Divergence, temperature: float, weight: float | None) -> None:
    a, b = pair(scale=1.0)
    pairs, rest_a, rest_b = same_ids()
    share = len(pairs) / table_of(KIND_B).num_tokens if weight is None else weight
    groups = span_groups(a, b)
    assert any(len(group_a) > 1 and len(group_b) > 1 for _, group_a, group_b in groups)
    values = []
    for row, group_a, group_b in groups:
        student, teacher = merged(a, row, group_a, temperature), merged(b, row, group_b, temperature)
        matched = slow_divergence(
            [teacher[other] for _, other in pairs], [student[index] for index, _ in pairs], divergence, 0.3
        )
        unmatched = slow_sorted_l1([student[index] for index in rest_a], [teacher[index] for index in rest_b])
        values.append(share * matched + (1 - share) * unmatched)
    vocabularies = match_vocabularies(table_of(KIND_A), table_of(KIND_B))
    direction = gold(vocabularies, temperature=temperature, divergence=divergence, jsd_beta=0.3, matched_weight=weight)
    assert float(direction(a, b).terms["gold"]) == pytest.approx(sum(values) / len(values), rel=1e-10)


def test_every_id_is_matched_once_or_left_over_once() -> None:
    a, b = table_of(KIND_A), table_of("unigram")
    match = match_vocabularies(a, b)
    assert sorted([*match.student_M.tolist(), *match.student_U.tolist()]) == list(range(a.num_tokens))
    assert sorted([*match.teacher_M.tolist(), *match.teacher_W.tolist()]) == list(range(b.num_tokens))
    matched = list(zip(match.student_M.tolist(), match.teacher_M.tolist(), strict=True))
    assert (a.end_id, b.end_id) in matched
    assert all(a.pieces[one] == b.pieces[other] for one, other in matched)


def test_equal_vocabularies_leave_the_plain_divergence() -> None:
    table = table_of(KIND_A)
    match = match_vocabularies(table, table)
    assert len(match.student_M) + len(match.student_U) == table.num_tokens
    logs = [torch.randn(2, 4, dtype=torch.float64).log_softmax(1) for _ in range(2)]
    all_four = VocabularyMatch(torch.arange(4), torch.arange(4), torch.arange(0), torch.arange(0))
    got = hybrid_values(logs[0], logs[1], all_four, divergence="forward_kl")
    torch.testing.assert_close(got, (logs[1].exp() * (logs[1] - logs[0])).sum(1))


def test_a_hand_worked_case() -> None:
    """Ids 0 are the same. Matched: 1/2 log((1/2) / (1/4)); unmatched |3/4 - 1/2|; weights 1/2 (one of two ids)."""
    match = VocabularyMatch(torch.tensor([0]), torch.tensor([0]), torch.tensor([1]), torch.tensor([1]))
    student, teacher = torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[0.5, 0.5]]).log()
    got = hybrid_values(student, teacher, match, divergence="forward_kl")
    assert float(got) == pytest.approx(0.5 * (0.5 * math.log(2)) + 0.5 * 0.25)
