import math

import pytest
import torch
from torch import Tensor

from cotuning.alignment import align
from cotuning.encoded_rows import EncodedRows
from cotuning.examples import Example
from cotuning.heads import Head
from cotuning.matching.interface import Reading
from cotuning.matching.mined import MinedDtw
from cotuning.mutual_loss import payload_loss
from cotuning.payload import PayloadRows
from cotuning.probe_logits import probe_places
from cotuning.received_logits import (
    Lessons,
    Received,
    fold_between,
    fold_payload,
    make_lessons,
    require_alignment,
    rows_at,
)
from cotuning.shared_rows import CoverageTooLow
from cotuning.vocabulary import Vocabulary
from tests.cotuning.trained_tokenizers import SENTENCES, trained

WIDTH, TOP_K, MAX_LENGTH = 6, 5, 96
PROBE = [Example(str(place), "Say it.", "", text) for place, text in enumerate([*SENTENCES[:6], SENTENCES[8]])]
ALL = list(range(len(PROBE)))


def vocabulary(kind: str) -> Vocabulary:
    return Vocabulary.of(trained(kind))


class Teacher:
    """Random distributions of a tokenizer, whole and as they are sent."""

    def __init__(self, kind: str, seed: int = 0, top_k: int = TOP_K, temperature: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        known = vocabulary(kind)
        places = probe_places(known, PROBE, max_length=MAX_LENGTH)
        logits_SV = torch.randn(len(places.sample_S), known.table.num_tokens, generator=generator).double() * 4
        self.logs_SV = (logits_SV / temperature).log_softmax(1)
        log_probs_SK, ids_SK = self.logs_SV.topk(min(top_k, known.table.num_tokens), dim=1)
        payload = PayloadRows(
            sample_S=places.sample_S,
            byte_start_S=places.byte_start_S,
            ids_SK=ids_SK,
            log_probs_SK=log_probs_SK,
            tail_S=(1 - log_probs_SK.exp().sum(1)).clamp(min=0),
            num_classes=known.table.num_tokens,
            temperature=temperature,
            fingerprint=known.table.fingerprint,
        )
        self.received = Received(payload, known, places, torch.zeros(len(PROBE)))


class Student:
    """Random hidden states and a head over a tokenizer's ids, float64."""

    def __init__(self, kind: str, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.rows = EncodedRows(vocabulary(kind), PROBE, max_length=MAX_LENGTH)
        self.batch = self.rows.batch(ALL)
        num_tokens = self.rows.lm.table.num_tokens
        shape = (*self.batch.input_ids_BT.shape, WIDTH)
        self.hidden_BTD = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        weight_VD = torch.randn(num_tokens, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
        self.head = Head(weight_VD, num_tokens)

    def loss(self, lessons: Lessons, indices: list[int]) -> Tensor | None:
        """Of some of the rows, as a batch of its own."""
        batch = self.rows.batch(indices)
        hidden_BTD = self.hidden_BTD[indices, : batch.input_ids_BT.shape[1]]
        return lessons.loss(indices, batch, hidden_BTD, self.head, count=lessons.count(indices, batch))


def lessons_of(alignment: str, student: Student, teachers: list[Teacher], teacher_of_row: dict[int, int]) -> Lessons:
    received = [teacher.received for teacher in teachers]
    return make_lessons(alignment, student.rows, received, teacher_of_row, max_length=MAX_LENGTH)  # type: ignore[arg-type]


@torch.no_grad()
def slow_fold(student: Student, teachers: list[Teacher], teacher_of_row: dict[int, int]) -> tuple[float, int]:
    """Row by row and place by place, over dictionaries of classes."""
    values: list[float] = []
    for row, place in teacher_of_row.items():
        teacher = teachers[place].received
        theirs = EncodedRows(teacher.vocabulary, PROBE, max_length=MAX_LENGTH)
        fold = fold_between(student.rows.lm, teacher.vocabulary)
        spans = align(student.rows.batch([row]), theirs.batch([row]))
        after_break = fold.after_break(spans)
        alone = align(theirs.batch([row]), theirs.batch([row]))
        byte_of_position = dict(zip(alone.row_a_S.tolist(), alone.byte_start_S.tolist(), strict=True))
        for span in range(spans.num_spans):
            part = fold if after_break is None or not after_break[span] or not fold.unspaced else fold.unspaced
            start = byte_of_position[int(spans.row_b_S[span])]
            where = (teacher.payload.sample_S == row) & (teacher.payload.byte_start_S == start)
            (at,) = where.nonzero().flatten().tolist()
            mass: dict[int, float] = {}
            for index, log_prob in zip(
                teacher.payload.ids_SK[at].tolist(), teacher.payload.log_probs_SK[at], strict=True
            ):
                label = int(part.map_b_V[index])
                mass[label] = mass.get(label, 0.0) + math.exp(float(log_prob))
            temperature = teacher.payload.temperature
            logits_V = student.hidden_BTD[row, spans.row_a_S[span]] @ student.head.weight_VD.T / temperature
            probs_V = logits_V.softmax(0)
            own = {label: float(probs_V[part.map_a_V == label].sum()) for label in mass}
            tail, own_tail = float(teacher.payload.tail_S[at]), 1 - sum(own.values())
            value = sum(p * math.log(p / own[label]) for label, p in mass.items()) + tail * math.log(tail / own_tail)
            values.append(temperature**2 * value)
    return sum(values) / len(values), len(values)


PAIRS = [
    ("byte_level", "unigram"),
    ("unigram", "byte_level"),
    ("byte_fallback", "word_piece"),
    ("word_piece", "byte_level"),
]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("student_kind", "teacher_kind"), PAIRS)
def test_the_folded_lesson_is_the_loop_over_places(student_kind: str, teacher_kind: str, temperature: float) -> None:
    student = Student(student_kind)
    teachers = [Teacher(teacher_kind, 2, temperature=temperature), Teacher(student_kind, 3, temperature=temperature)]
    teacher_of_row = {0: 0, 1: 1, 3: 0, 4: 0, 6: 1}
    lessons = lessons_of("fold", student, teachers, teacher_of_row)
    expected, count = slow_fold(student, teachers, teacher_of_row)
    assert lessons.name == "kl"
    assert lessons.count(ALL, student.batch) == count
    assert count > 50
    loss = student.loss(lessons, ALL)
    assert loss is not None
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-6)


def test_between_equal_tokenizers_nothing_is_folded() -> None:
    student, teacher = Student("byte_level"), Teacher("byte_level")
    loss = student.loss(lessons_of("fold", student, [teacher], dict.fromkeys(ALL, 0)), ALL)
    spans = align(student.batch, student.batch)
    plain = payload_loss(student.hidden_BTD[spans.sample_S, spans.row_a_S], student.head, teacher.received.payload)
    assert loss is not None
    assert torch.equal(loss, plain)


def test_a_folded_payload_by_hand() -> None:
    payload = PayloadRows(
        sample_S=torch.tensor([0]),
        byte_start_S=torch.tensor([0]),
        ids_SK=torch.tensor([[4, 0, 2, 3]]),
        log_probs_SK=torch.tensor([[0.4, 0.3, 0.15, 0.05]]).log(),
        tail_S=torch.tensor([0.1]),
        num_classes=5,
        temperature=1.0,
        fingerprint="f",
    )
    folded = fold_payload(payload, torch.tensor([1, 0, 1, 2, 2]), 3)
    assert folded.num_classes == 3 + 4
    assert sorted(folded.ids_SK[0].tolist()) == [1, 2, 5, 6]  # two classes, and two that nothing is in
    probs = dict(zip(folded.ids_SK[0].tolist(), folded.log_probs_SK[0].exp().tolist(), strict=True))
    assert probs == pytest.approx({1: 0.45, 2: 0.45, 5: 0.0, 6: 0.0}, abs=1e-7)
    assert float(folded.tail_S) == pytest.approx(0.1)


def test_rows_are_found_by_sample_and_byte() -> None:
    payload = Teacher("byte_level").received.payload
    assert torch.equal(rows_at(payload, payload.sample_S, payload.byte_start_S), torch.arange(len(payload.sample_S)))
    nowhere = rows_at(payload, torch.tensor([0, 99, 6]), torch.tensor([9_999, 0, -1]))
    assert nowhere.tolist() == [-1, -1, -1]
    assert rows_at(payload.take(torch.arange(0)), torch.tensor([0]), torch.tensor([0])).tolist() == [-1]


@pytest.mark.parametrize(("student_kind", "teacher_kind"), PAIRS)
def test_the_mined_lesson_is_that_of_the_matching_which_has_the_model(student_kind: str, teacher_kind: str) -> None:
    """What a payload tells is what `MinedDtw` reads from the teacher's own hidden states."""
    student, teacher = Student(student_kind), Teacher(teacher_kind)
    table = teacher.received.vocabulary.table
    batch = EncodedRows(teacher.received.vocabulary, PROBE, max_length=MAX_LENGTH).batch(ALL)
    own = align(batch, batch)
    # The teacher's logits as hidden states under a head that is the identity.
    hidden_BTV = torch.zeros(*batch.input_ids_BT.shape, table.num_tokens, dtype=torch.float64)
    hidden_BTV[own.sample_S, own.row_a_S] = teacher.logs_SV
    reading = Reading(batch, hidden_BTV, Head(torch.eye(table.num_tokens, dtype=torch.float64), table.num_tokens))
    matching = MinedDtw(student.rows.lm.table, table, temperature=1.0, top_k=TOP_K)
    expected = matching(Reading(student.batch, student.hidden_BTD, student.head), reading).terms["mined"]
    lessons = lessons_of("mined_dtw", student, [teacher], dict.fromkeys(ALL, 0))
    loss = student.loss(lessons, ALL)
    assert lessons.name == "mined"
    assert loss is not None
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)


def test_where_nobody_teaches_the_mined_target_is_the_token_itself() -> None:
    student = Student("byte_level")
    lessons = lessons_of("mined_dtw", student, [Teacher("unigram")], {})
    loss = student.loss(lessons, ALL)
    next_BT = student.batch.labels_BT[:, 1:]
    logits_NV = student.hidden_BTD[:, :-1][next_BT >= 0] @ student.head.weight_VD.T
    expected = torch.nn.functional.cross_entropy(logits_NV, next_BT[next_BT >= 0])
    assert loss is not None
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-9)
    assert student.loss(lessons_of("fold", student, [Teacher("unigram")], {}), ALL) is None


@pytest.mark.parametrize("alignment", ["fold", "mined_dtw"])
def test_parts_of_a_batch_add_up_and_a_row_may_stand_in_it_twice(alignment: str) -> None:
    student = Student("byte_fallback")
    teacher_of_row = {0: 1, 1: 0, 2: 0, 5: 1}
    lessons = lessons_of(alignment, student, [Teacher("byte_level"), Teacher("unigram")], teacher_of_row)
    indices = [5, 0, 3, 0, 1]
    count = lessons.count(indices, student.rows.batch(indices))
    whole = lessons.loss(indices, student.rows.batch(indices), _hidden(student, indices), student.head, count=count)
    assert whole is not None
    total = torch.zeros(())
    for part in ([5, 0], [3], [0, 1]):
        batch = student.rows.batch(part)
        term = lessons.loss(part, batch, _hidden(student, part), student.head, count=count)
        total = total if term is None else total + term.detach()
    assert float(total) == pytest.approx(float(whole.detach()), rel=1e-9)


def _hidden(student: Student, indices: list[int]) -> Tensor:
    return student.hidden_BTD[indices, : student.rows.batch(indices).input_ids_BT.shape[1]]


@pytest.mark.parametrize("alignment", ["fold", "mined_dtw"])
def test_gradients_are_those_of_numbers_and_reach_the_student_only(alignment: str) -> None:
    student, teacher = Student("unigram"), Teacher("byte_level")
    lessons = lessons_of(alignment, student, [teacher], {0: 0})
    payload = teacher.received.payload
    assert not any(tensor.requires_grad for tensor in (payload.log_probs_SK, payload.tail_S))
    loss = student.loss(lessons, [0])
    assert loss is not None
    loss.backward()  # type: ignore[no-untyped-call]
    gradient = student.hidden_BTD.grad
    assert gradient is not None
    assert not gradient[1:].any()
    prompt_T = student.batch.labels_BT[0, 1:] < 0
    assert not gradient[0, :-1][prompt_T].any()
    place = tuple(gradient[0].abs().argmax().unsqueeze(0).tolist())
    row, column = divmod(place[0], WIDTH)
    step = 1e-6
    found = []
    for sign in (1, -1):
        with torch.no_grad():
            student.hidden_BTD[0, row, column] += sign * step
            moved = student.loss(lessons, [0])
            student.hidden_BTD[0, row, column] -= sign * step
        assert moved is not None
        found.append(float(moved))
    assert (found[0] - found[1]) / (2 * step) == pytest.approx(float(gradient[0, row, column]), rel=1e-4)


def test_a_pair_that_does_not_align_is_refused() -> None:
    rows = Student("byte_level").rows
    stats = require_alignment(rows, vocabulary("byte_level"), PROBE, max_length=MAX_LENGTH, min_coverage=0.8)
    assert (stats.coverage, stats.class_agreement) == (1.0, 1.0)
    with pytest.raises(CoverageTooLow, match=r"expected at least 1\.\d+, got"):
        require_alignment(rows, vocabulary("byte_level"), PROBE, max_length=MAX_LENGTH, min_coverage=1.01)


def test_logits_of_two_temperatures_are_refused() -> None:
    teachers = [Teacher("unigram", temperature=1.0), Teacher("unigram", temperature=2.0)]
    with pytest.raises(ValueError, match=r"one temperature, got \[1.0, 2.0\]"):
        lessons_of("mined_dtw", Student("byte_level"), teachers, {0: 0, 1: 1})
