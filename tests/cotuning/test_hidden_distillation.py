import math

import pytest
import torch
from torch import Tensor

from cotuning.hidden_distillation import feature_loss, fresh_projections, map_layers, relation_loss

CPU = torch.device("cpu")


def numbers(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def slow_feature(student: Tensor, teacher: Tensor, projection: Tensor) -> float:
    error = size = 0.0
    for mine, theirs in zip(student.tolist(), teacher.tolist(), strict=True):
        for column, target in enumerate(theirs):
            mapped = sum(value * projection[row, column].item() for row, value in enumerate(mine))
            error += (mapped - target) ** 2
            size += target**2
    return error / size


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def slow_relation(student: Tensor, teacher: Tensor, rows: list[int]) -> float:
    losses = []
    for i, row in enumerate(rows):
        for j, other in enumerate(rows):
            if i != j and row == other:
                mine, theirs = student.tolist(), teacher.tolist()
                gap = abs(cosine(mine[i], mine[j]) - cosine(theirs[i], theirs[j]))
                losses.append(gap**2 / 2 if gap <= 1 else gap - 0.5)
    return sum(losses) / len(losses)


def test_layers_are_mapped_evenly_and_the_last_to_the_last() -> None:
    assert map_layers(2, 6) == [(1, 3), (2, 6)]
    assert map_layers(4, 4) == [(1, 1), (2, 2), (3, 3), (4, 4)]
    assert map_layers(3, 32)[-1] == (3, 32)
    assert map_layers(1, 12) == [(1, 12)]


def test_feature_loss_equals_a_slow_formula() -> None:
    students = [numbers(5, 3, seed=layer) for layer in range(2)]
    teachers = [numbers(5, 4, seed=10 + layer, scale=3.0) for layer in range(2)]
    projections = [numbers(3, 4, seed=20 + layer) for layer in range(2)]
    expected = [slow_feature(*each) for each in zip(students, teachers, projections, strict=True)]
    got = feature_loss(students, teachers, projections)
    assert got.item() == pytest.approx(sum(expected) / 2, rel=1e-12)


def test_feature_loss_is_zero_for_a_teacher_that_the_map_reaches_and_one_for_a_student_that_says_nothing() -> None:
    student, projection = numbers(6, 3, seed=1), numbers(3, 5, seed=2)
    assert feature_loss([student], [student @ projection], [projection]).item() == pytest.approx(0, abs=1e-20)
    assert feature_loss([student * 0], [numbers(6, 5, seed=3)], [projection]).item() == pytest.approx(1)
    # Its size does not depend on the teacher's.
    teacher = numbers(6, 5, seed=4)
    plain = feature_loss([student], [teacher], [projection])
    assert feature_loss([student * 50], [teacher * 50], [projection]).item() == pytest.approx(plain.item())


@pytest.mark.parametrize("rows", [[0, 0, 0, 1, 1, 4, 4, 4, 4], [0, 1, 1, 3], [7, 7]])
def test_relation_loss_equals_a_slow_formula(rows: list[int]) -> None:
    student, teacher = numbers(len(rows), 3, seed=1), numbers(len(rows), 6, seed=2)
    got = relation_loss([student], [teacher], torch.tensor(rows))
    assert got.item() == pytest.approx(slow_relation(student, teacher, rows), rel=1e-12)


def test_relation_loss_by_hand() -> None:
    """Two positions: orthogonal for the student, opposite for the teacher; a gap of 1, on the quadratic side."""
    student = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    teacher = torch.tensor([[3.0, 0.0, 0.0], [-1.0, 0.0, 0.0]])
    assert relation_loss([student], [teacher], torch.tensor([0, 0])).item() == pytest.approx(0.5)
    same = torch.tensor([[3.0, 0.0], [1.0, 0.0]])  # a gap of 2, on the linear side
    assert relation_loss([same], [teacher], torch.tensor([0, 0])).item() == pytest.approx(1.5)


def test_relations_do_not_see_rotation_or_size_and_rows_do_not_mix() -> None:
    teacher = numbers(6, 4, seed=1)
    rotation = torch.linalg.qr(numbers(4, 4, seed=2))[0]
    rows = torch.tensor([0, 0, 0, 1, 1, 1])
    assert relation_loss([5 * teacher @ rotation], [teacher], rows).item() == pytest.approx(0, abs=1e-15)
    flipped = torch.cat([teacher[:3], -teacher[3:]])  # only relations between the two rows change
    assert relation_loss([flipped], [teacher], rows).item() == pytest.approx(0, abs=1e-15)
    assert relation_loss([flipped], [teacher], torch.zeros(6, dtype=torch.int64)).item() > 0.01


def test_no_pairs_give_zero_and_finite_gradients() -> None:
    student = numbers(3, 4, seed=1).requires_grad_()
    loss = relation_loss([student], [numbers(3, 4, seed=2)], torch.tensor([0, 1, 2]))
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0
    assert student.grad is not None
    assert not student.grad.any()
    assert relation_loss([student[:0]], [student[:0]], torch.zeros(0, dtype=torch.int64)).item() == 0


def test_gradients() -> None:
    rows = torch.tensor([0, 0, 0, 2, 2])
    student, projection = numbers(5, 3, seed=1).requires_grad_(), numbers(3, 4, seed=2).requires_grad_()
    teacher = numbers(5, 4, seed=3).requires_grad_()

    def feature(student_SD: Tensor, projection_DE: Tensor) -> Tensor:
        return feature_loss([student_SD, 2 * student_SD], [teacher, teacher + 1], [projection_DE, projection_DE])

    def relation(student_SD: Tensor) -> Tensor:
        return relation_loss([student_SD, student_SD.square()], [teacher, teacher + 1], rows)

    assert torch.autograd.gradcheck(feature, (student, projection))
    assert torch.autograd.gradcheck(relation, (student,))
    (feature(student, projection) + relation(student)).backward()  # type: ignore[no-untyped-call]
    assert teacher.grad is None  # not small: it does not exist


def test_unequal_numbers_of_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        feature_loss([numbers(2, 2, seed=1)], [], [numbers(2, 2, seed=1)])
    with pytest.raises(ValueError, match="zip"):
        relation_loss([numbers(2, 2, seed=1)], [], torch.tensor([0, 0]))


def test_maps_follow_from_the_seed_and_have_about_unit_gain() -> None:
    first, second = fresh_projections([(64, 32), (64, 256)], seed=3, device=CPU)
    assert (first.shape, second.shape) == ((64, 32), (64, 256))
    assert torch.equal(first, fresh_projections([(64, 32)], seed=3, device=CPU)[0])
    assert not torch.equal(first, fresh_projections([(64, 32)], seed=4, device=CPU)[0])
    assert first.requires_grad
    assert first.is_leaf
    assert (numbers(500, 64, seed=1).float() @ second).std().item() == pytest.approx(1, rel=0.05)
