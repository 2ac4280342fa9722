"""Learning from the logits that another party sent on the probe set, over token ids of its own tokenizer.

A party sends its K most likely token ids at every place where its own tokenizer predicts a token of a response
(`probe_logits`), one payload for all who read it. Who reads it knows the sender's tokenizer and aligns on its own side,
in one of two ways:

* `fold`: where both tokenizations end a token, the sender's ids and the reader's are folded onto the classes of
  `folding`, and the lesson is `T^2 KL(teacher || student)` over the classes that hold an id of the K, and one bucket
  for all others; a mean over such places. The tail's mass is in the bucket, whatever its ids' classes are: a sender
  cannot know the classes of every reader, and sends no more than K. So for unlike tokenizers a class may count less
  than its mass, by at most the tail; for equal ones nothing is folded, and the lesson is `mutual_loss.payload_loss`.
* `mined_dtw`: FedMKT's (arXiv 2406.02224), see `matching.mined`: a cross-entropy with the teacher's distribution where
  a token has one partner by dynamic time warping, with the token itself elsewhere; a mean over response tokens.

Names: N probe rows, S places, K ids of the sender, C classes, V token ids, B rows of a batch, T tokens, D hidden size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from cotuning.alignment import align
from cotuning.cross_entropy import ResponseTokens, response_tokens
from cotuning.encoded_rows import EncodedRows
from cotuning.encoding import EncodedBatch
from cotuning.examples import Example
from cotuning.folding import FoldPair, fold_pair
from cotuning.heads import Head
from cotuning.matching.interface import mean
from cotuning.matching.mined import MinedDtw, Targets, target_cross_entropies
from cotuning.mutual_loss import payload_loss
from cotuning.payload import PayloadRows
from cotuning.probe_logits import ProbePlaces
from cotuning.shared_rows import AlignmentStats, CoverageTooLow, measure_alignment
from cotuning.vocabulary import Reads

AlignmentName = Literal["mined_dtw", "fold"]

_ROWS_AT_ONCE = 32


@dataclass(frozen=True)
class Received:
    """Checked logits of one sender.

    Attributes:
        payload: over the sender's token ids, on the CPU.
        vocabulary: the sender's.
        places: of that vocabulary on the probe set, at which the payload's rows stand.
        losses_N: the cross-entropy of each row that the sender says it has, nats a token.
    """

    payload: PayloadRows
    vocabulary: Reads
    places: ProbePlaces
    losses_N: Tensor


class Lessons(Protocol):
    """What a student is taught on the probe rows, ready for every batch of them."""

    @property
    def name(self) -> str:
        """Under which the term is reported."""

    def count(self, indices: Sequence[int], batch: EncodedBatch) -> int:
        """What the term's mean over a batch is over; needs no forward pass."""

    def loss(
        self, indices: Sequence[int], batch: EncodedBatch, hidden_BTD: Tensor, head: Head, *, count: int
    ) -> Tensor | None:
        """The term, with gradients to the student's tensors only; None where nothing is taught.

        Args:
            indices: which probe rows the batch holds.
            batch: as the student reads them.
            hidden_BTD: its last hidden states.
            head: its head.
            count: what the sum is divided by: of the whole step, where the batch is a part of one.
        """


def make_lessons(
    alignment: AlignmentName,
    rows: EncodedRows,
    received: Sequence[Received],
    teacher_of_row: Mapping[int, int],
    *,
    max_length: int,
) -> Lessons:
    """Align every teacher's logits with the student's tokens, once.

    Args:
        alignment: see above.
        rows: the probe set as the student reads it.
        received: the senders.
        teacher_of_row: probe row -> index in `received` of who teaches it; other rows are not taught.
        max_length: tokens of a probe row, as the senders were told.
    """
    rows_of: dict[int, list[int]] = {}
    for row, teacher in sorted(teacher_of_row.items()):
        rows_of.setdefault(teacher, []).append(row)
    if alignment == "fold":
        groups = [
            group
            for teacher, samples in sorted(rows_of.items())
            for group in _fold_teacher(rows, received[teacher], samples, max_length)
        ]
        return FoldedLessons(groups)
    targets: dict[int, Targets] = {}
    for teacher, samples in sorted(rows_of.items()):
        targets |= _mine_teacher(rows, received[teacher], samples, max_length)
    temperatures = {sender.payload.temperature for sender in received}
    if len(temperatures) > 1:
        raise ValueError(f"expected logits of one temperature, got {sorted(temperatures)}")
    return MinedLessons(targets, temperature=max(temperatures, default=1.0))


def fold_between(student: Reads, teacher: Reads) -> FoldPair:
    """The fold whose side A is the student, on the student's device."""
    return fold_pair(student.tokenizer, student.table, teacher.tokenizer, teacher.table).to(student.device)


def require_alignment(
    rows: EncodedRows, teacher: Reads, examples: Sequence[Example], *, max_length: int, min_coverage: float
) -> AlignmentStats:
    """How well a student's tokens on the probe set align with a sender's.

    Raises:
        CoverageTooLow: coverage or class agreement is below `min_coverage`.
    """
    teacher_rows = EncodedRows(teacher, examples, max_length=max_length)
    stats = measure_alignment(rows, teacher_rows, fold_between(rows.lm, teacher), range(len(examples)))
    for measure in ("coverage", "class_agreement"):
        value = getattr(stats, measure)
        if value < min_coverage:
            raise CoverageTooLow(measure, min_coverage, value)
    return stats


def fold_payload(payload: PayloadRows, map_V: Tensor, num_classes: int) -> PayloadRows:
    """The payload's distributions over classes: ids of one class are one, and the tail stays the tail.

    Where a row has fewer than K classes, ids from C on, that nothing else is in, fill it up with a mass of nothing.

    Args:
        payload: over the ids of `map_V`, on its device.
        map_V: class of each id.
        num_classes: C.

    Returns:
        A payload of C + K classes, each row's ids distinct but in no order of probability.
    """
    num_rows, num_kept = payload.ids_SK.shape
    classes_SK, order_SK = map_V[payload.ids_SK].sort(dim=1, stable=True)
    probs_SK = payload.log_probs_SK.double().exp().gather(1, order_SK)
    new_SK = torch.ones_like(classes_SK, dtype=torch.bool)
    new_SK[:, 1:] = classes_SK[:, 1:] != classes_SK[:, :-1]
    place_SK = new_SK.cumsum(1) - 1
    mass_SK = torch.zeros_like(probs_SK).scatter_add_(1, place_SK, probs_SK)
    fill_SK = num_classes + torch.arange(num_kept, device=classes_SK.device).expand(num_rows, -1)
    return replace(
        payload,
        ids_SK=fill_SK.clone().scatter_(1, place_SK, classes_SK),
        log_probs_SK=mass_SK.clamp(min=torch.finfo(torch.float32).tiny).log().float(),
        num_classes=num_classes + num_kept,
    )


def rows_at(payload: PayloadRows, sample_S: Tensor, byte_start_S: Tensor) -> Tensor:
    """The payload's row at each place (a probe row, and a byte of its response), -1 where it has none."""
    if not len(payload.sample_S):
        return torch.full_like(sample_S, -1)
    width = 1 + max(int(payload.byte_start_S.max()), int(byte_start_S.max()) if len(byte_start_S) else 0)
    known_R = payload.sample_S * width + payload.byte_start_S
    wanted_S = sample_S * width + byte_start_S
    found_S = torch.searchsorted(known_R, wanted_S).clamp(max=len(known_R) - 1)
    return found_S.where(known_R[found_S] == wanted_S, -1)


def _rows_by_position(payload: PayloadRows, batch: EncodedBatch, samples: Sequence[int]) -> Tensor:
    """The payload's row at each position of the sender's tokens, -1 where it has none: [B, T].

    By position, because a tokenizer that drops text (WordPiece) may begin its span at an earlier byte for another one.
    """
    own = align(batch, batch)
    rows_BT = torch.full_like(batch.input_ids_BT, -1)
    sample_S = torch.tensor(samples, device=rows_BT.device)[own.sample_S]
    rows_BT[own.sample_S, own.row_a_S] = rows_at(payload, sample_S, own.byte_start_S)
    return rows_BT


@dataclass(frozen=True)
class _Group:
    """Places of one teacher that share a fold.

    Attributes:
        map_V: the student's map onto the payload's classes; None where these are its own ids.
        payload: sorted by sample.
        position_S: position of the student's row whose hidden state stands there.
        rows_of_sample: probe row -> its rows of the payload.
    """

    map_V: Tensor | None
    payload: PayloadRows
    position_S: Tensor
    rows_of_sample: Mapping[int, slice]


class FoldedLessons:
    """See the module; reported as `kl`."""

    name = "kl"

    def __init__(self, groups: Sequence[_Group]) -> None:
        self._groups = groups

    def count(self, indices: Sequence[int], batch: EncodedBatch) -> int:
        """Places where a teacher speaks; see `Lessons`."""
        found = (group.rows_of_sample.get(index, slice(0, 0)) for group in self._groups for index in indices)
        return sum(rows.stop - rows.start for rows in found)

    def loss(
        self, indices: Sequence[int], batch: EncodedBatch, hidden_BTD: Tensor, head: Head, *, count: int
    ) -> Tensor | None:
        """See `Lessons`."""
        total: Tensor | None = None
        for group in self._groups:
            found = [(place, group.rows_of_sample.get(index)) for place, index in enumerate(indices)]
            index_S = torch.cat(
                [torch.arange(rows.start, rows.stop) for _, rows in found if rows] or [torch.arange(0)]
            ).to(hidden_BTD.device)
            if not len(index_S):
                continue
            sample_S = torch.cat([torch.full((rows.stop - rows.start,), place) for place, rows in found if rows])
            term = payload_loss(
                hidden_BTD[sample_S.to(hidden_BTD.device), group.position_S[index_S]],
                head,
                group.payload.take(index_S),
                map_V=group.map_V,
                num_spans=count,
            )
            total = term if total is None else total + term
        return total


def _fold_teacher(rows: EncodedRows, sender: Received, samples: Sequence[int], max_length: int) -> list[_Group]:
    """One group of places for each part of the fold."""
    device = rows.lm.device
    fold, payload = fold_between(rows.lm, sender.vocabulary), sender.payload.to(device)
    teacher_rows = EncodedRows(sender.vocabulary, rows.examples, max_length=max_length)
    columns: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in range(0, len(samples), _ROWS_AT_ONCE):
        chosen = samples[start : start + _ROWS_AT_ONCE]
        teacher_batch = teacher_rows.batch(chosen).to(device)
        spans = align(rows.batch(chosen), teacher_batch)
        row_S = _rows_by_position(payload, teacher_batch, chosen)[spans.sample_S, spans.row_b_S]
        after_break_S = fold.after_break(spans)
        if after_break_S is None:
            after_break_S = torch.zeros_like(row_S, dtype=torch.bool)
        columns.append((row_S[row_S >= 0], spans.row_a_S[row_S >= 0], after_break_S[row_S >= 0]))
    row_S, position_S, after_break_S = (torch.cat(parts) for parts in zip(*columns, strict=True))
    after_break = after_break_S if fold.unspaced is not None else None
    groups = []
    for part, index_S in fold.parts(after_break, len(row_S)):
        taken = payload.take(row_S[index_S])
        if part.identical:
            groups.append(_Group(None, taken, position_S[index_S], _slices(taken.sample_S)))
        else:
            folded = fold_payload(taken, part.map_b_V, part.num_classes)
            groups.append(_Group(part.map_a_V, folded, position_S[index_S], _slices(taken.sample_S)))
    return groups


def _slices(sample_S: Tensor) -> dict[int, slice]:
    """Where each sample's rows lie, in a list sorted by sample."""
    samples, counts = torch.unique_consecutive(sample_S, return_counts=True)
    stops = counts.cumsum(0).tolist()
    starts = [0, *stops[:-1]]
    return {sample: slice(*bounds) for sample, *bounds in zip(samples.tolist(), starts, stops, strict=True)}


class MinedLessons:
    """See the module; reported as `mined`. Rows that nobody teaches have the tokens that were read as targets."""

    name = "mined"

    def __init__(self, targets_of_row: Mapping[int, Targets], *, temperature: float) -> None:
        self._targets = targets_of_row
        self._temperature = temperature
        self._width = max((targets.ids_NK.shape[1] for targets in targets_of_row.values()), default=1)

    def count(self, indices: Sequence[int], batch: EncodedBatch) -> int:
        """The student's response tokens; see `Lessons`."""
        return len(response_tokens(batch).target_N)

    def loss(
        self, indices: Sequence[int], batch: EncodedBatch, hidden_BTD: Tensor, head: Head, *, count: int
    ) -> Tensor | None:
        """See `Lessons`."""
        tokens = response_tokens(batch)
        if not len(tokens.target_N):
            return None
        targets = self._gather(indices, tokens)
        hidden_ND = hidden_BTD[tokens.sample_N, tokens.position_N]
        return mean(target_cross_entropies(hidden_ND, head, targets, temperature=self._temperature), count)

    def _gather(self, indices: Sequence[int], tokens: ResponseTokens) -> Targets:
        """The targets of a batch's tokens: its own tokens, overwritten where somebody teaches."""
        ids_NK = tokens.target_N[:, None].repeat(1, self._width)
        probs_NK = torch.zeros(ids_NK.shape, device=ids_NK.device)
        probs_NK[:, 0] = 1.0
        start = 0
        for index, size in zip(indices, tokens.sample_N.bincount(minlength=len(indices)).tolist(), strict=True):
            known = self._targets.get(index)
            if known is not None:
                width = known.ids_NK.shape[1]
                ids_NK[start : start + size, :width] = known.ids_NK
                probs_NK[start : start + size, :width] = known.probs_NK
            start += size
        return Targets(ids_NK, probs_NK)


def _mine_teacher(rows: EncodedRows, sender: Received, samples: Sequence[int], max_length: int) -> dict[int, Targets]:
    """Targets of each row's response tokens."""
    device = rows.lm.device
    payload = sender.payload.to(device)
    teacher_rows = EncodedRows(sender.vocabulary, rows.examples, max_length=max_length)
    matching = MinedDtw(rows.lm.table, sender.vocabulary.table, temperature=payload.temperature)
    found: dict[int, Targets] = {}
    for sample in samples:
        batch = teacher_rows.batch([sample]).to(device)
        tokens, teacher_tokens = response_tokens(rows.batch([sample])), response_tokens(batch)
        row_N = _rows_by_position(payload, batch, [sample])[0, teacher_tokens.position_N]

        def read(place_N: Tensor, row_N: Tensor = row_N) -> tuple[Tensor, Tensor]:
            ids_NK = payload.ids_SK[row_N[place_N].clamp(min=0)]
            known_N1 = (row_N[place_N] >= 0)[:, None]
            return ids_NK.where(known_N1, -1), payload.log_probs_SK[row_N[place_N].clamp(min=0)]

        found[sample], _ = matching.targets_from(tokens, teacher_tokens, read, rows=1)
    return found
