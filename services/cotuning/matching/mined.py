"""Token alignment by dynamic time warping and least edit distance (MinED): FuseLLM (arXiv 2401.10491) and FedMKT
(arXiv 2406.02224).

Each of the student's response tokens is aligned with the teacher's by DTW over their strings. Where it has exactly one
partner, and that partner's nearest piece in the student's vocabulary is the token itself, the teacher's K most likely
ids before the partner are taken to their nearest pieces, and the softmax of their logits is the target; everywhere else
the target is the token that was read:

    loss = mean over the student's response tokens of  - sum_v target(v) log p_s(v)

A cross-entropy, as in FedMKT's equations 7 and 8, not a KL: it is not zero for equal models. Of several ids with the
same nearest piece the most likely one counts. Chosen here: both distributions are read at the position *before* their
token, so that the one-hot target is the token which that position predicts; strings are pieces' bytes; END is one more
token; K is 10. Temperature softens both sides; T^2 does not enter.

Names: N response tokens of the student, K ids of the teacher, V token ids.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cotuning.cross_entropy import ResponseTokens, response_tokens
from cotuning.encoding import EncodedBatch
from cotuning.heads import Head
from cotuning.language_model import logits
from cotuning.matching.dtw import dtw_align
from cotuning.matching.edit_distance import NearestPieces
from cotuning.matching.interface import Lesson, Reading, by_rows, log_probs, mean
from cotuning.token_tables import TokenTable

TOP_K = 10
"""How many of the teacher's ids make a target."""


@dataclass(frozen=True)
class Targets:
    """A sparse target for each of the student's response tokens.

    Attributes:
        ids_NK: ids of the student.
        probs_NK: their probabilities, rows sum to one; 0 for places that are not used.
    """

    ids_NK: Tensor
    probs_NK: Tensor


def distinct_softmax(mapped_NK: Tensor, logits_NK: Tensor) -> Tensor:
    """The softmax of each row over its known (not -1) ids, each once: at its first place. 0 elsewhere.

    Args:
        mapped_NK: ids, -1 where there is none; the most likely first.
        logits_NK: already divided by the temperature.
    """
    earlier_KK = torch.ones(mapped_NK.shape[1], mapped_NK.shape[1], device=mapped_NK.device).tril(-1).bool()
    repeated_NK = ((mapped_NK[:, :, None] == mapped_NK[:, None, :]) & earlier_KK).any(-1)
    kept_NK = (mapped_NK >= 0) & ~repeated_NK
    weights_NK = (logits_NK - logits_NK.amax(1, keepdim=True)).exp() * kept_NK
    return weights_NK / weights_NK.sum(1, keepdim=True).clamp(min=torch.finfo(weights_NK.dtype).tiny)


def target_cross_entropies(hidden_ND: Tensor, head: Head, targets: Targets, *, temperature: float) -> Tensor:
    """`- sum_v target(v) log p_s(v)` of each response token, nats: [N], with gradients to the student's tensors."""

    def values(hidden_ND: Tensor, ids_NK: Tensor, probs_NK: Tensor) -> Tensor:
        logs_NV = log_probs(hidden_ND, head, temperature)
        return -(probs_NK * logs_NV.gather(1, ids_NK)).sum(1)

    return by_rows(values, hidden_ND, targets.ids_NK, targets.probs_NK)


class MinedDtw:
    """The direction; reported as `mined`, with the share of tokens that got a teacher's distribution.

    Args:
        student: the student's table.
        teacher: the teacher's.
        temperature: of both softmaxes.
        top_k: K.
    """

    def __init__(self, student: TokenTable, teacher: TokenTable, *, temperature: float, top_k: int = TOP_K) -> None:
        self._student = student
        self._teacher = teacher
        self._temperature = temperature
        self._top_k = min(top_k, teacher.num_tokens)
        self._nearest = NearestPieces(teacher, student)
        # A path depends on the ids alone, and rows are drawn again and again.
        self._partners: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}

    def __call__(self, student: Reading, teacher: Reading, num_tokens: float | None = None) -> Lesson:
        """See `interface.Direction`."""
        tokens = response_tokens(student.batch)
        targets, taught_N = self.targets(tokens, teacher)
        hidden_ND = student.hidden_BTD[tokens.sample_N, tokens.position_N]
        values_N = target_cross_entropies(hidden_ND, student.head, targets, temperature=self._temperature)
        share = mean(taught_N.to(targets.probs_NK.dtype), num_tokens)
        return Lesson({"mined": mean(values_N, num_tokens)}, metrics={"mined_share": share})

    def count(self, student: EncodedBatch, teacher: EncodedBatch) -> int:
        """The student's response tokens."""
        return len(response_tokens(student).target_N)

    @torch.no_grad()
    def targets(self, tokens: ResponseTokens, teacher: Reading) -> tuple[Targets, Tensor]:
        """The targets of the student's response tokens, and which of them the teacher gave; bool [N]."""
        teacher_tokens = response_tokens(teacher.batch)

        def read(place_N: Tensor) -> tuple[Tensor, Tensor]:
            hidden_ND = teacher.hidden_BTD[teacher_tokens.sample_N[place_N], teacher_tokens.position_N[place_N]]
            top = logits(hidden_ND, teacher.head).topk(self._top_k, dim=1)
            return top.indices, top.values / self._temperature

        return self.targets_from(tokens, teacher_tokens, read, rows=len(teacher.batch.digest_B))

    def targets_from(
        self,
        tokens: ResponseTokens,
        teacher_tokens: ResponseTokens,
        read: Callable[[Tensor], tuple[Tensor, Tensor]],
        *,
        rows: int,
    ) -> tuple[Targets, Tensor]:
        """The same, whatever tells the teacher's distributions.

        Args:
            tokens: the student's response tokens.
            teacher_tokens: the teacher's, of the same rows.
            read: from indices of the teacher's tokens to its K most likely ids there, the most likely first and -1
                where nothing is known, and their logits over the temperature, up to a constant of the row.
            rows: B.
        """
        partner_N = self._aligned(tokens, teacher_tokens, rows=rows)
        taught_N = partner_N >= 0
        place_N = partner_N[taught_N]
        taught_N[taught_N.clone()] = self._nearest(teacher_tokens.target_N[place_N]) == tokens.target_N[taught_N]
        top_ids_NK, logits_NK = read(partner_N[taught_N])
        mapped_NK = self._nearest(top_ids_NK.clamp(min=0)).where(top_ids_NK >= 0, -1)
        probs_NK = distinct_softmax(mapped_NK, logits_NK)
        ids_NK = tokens.target_N[:, None].repeat(1, top_ids_NK.shape[1])
        one_hot_NK = torch.zeros(ids_NK.shape, dtype=probs_NK.dtype, device=ids_NK.device)
        one_hot_NK[:, :1] = 1.0
        # Where the teacher's ids are all specials, nothing is known of its distribution.
        usable_N = (mapped_NK >= 0).any(1)
        taught_N[taught_N.clone()] = usable_N
        ids_NK[taught_N] = mapped_NK[usable_N].clamp(min=0)
        one_hot_NK[taught_N] = probs_NK[usable_N]
        return Targets(ids_NK, one_hot_NK), taught_N

    def _aligned(self, tokens: ResponseTokens, teacher_tokens: ResponseTokens, *, rows: int) -> Tensor:
        """For each student token its only partner among the teacher's tokens, -1 where it has several or none, [N]."""
        partners: list[int] = []
        start = 0
        student_ids, teacher_ids = (_by_row(each, rows) for each in (tokens, teacher_tokens))
        for ids_s, ids_t in zip(student_ids, teacher_ids, strict=True):
            if (ids_s, ids_t) not in self._partners:
                self._partners[ids_s, ids_t] = self._only_partners(ids_s, ids_t)
            partners += [start + place if place >= 0 else -1 for place in self._partners[ids_s, ids_t]]
            start += len(ids_t)
        return torch.tensor(partners, dtype=torch.int64, device=tokens.target_N.device)

    def _only_partners(self, ids_s: tuple[int, ...], ids_t: tuple[int, ...]) -> list[int]:
        path = dtw_align(
            [self._student.pieces[index] or b"" for index in ids_s],
            [self._teacher.pieces[index] or b"" for index in ids_t],
        )
        places: list[list[int]] = [[] for _ in ids_s]
        for place_s, place_t in path.tolist():
            places[place_s].append(place_t)
        return [found[0] if len(found) == 1 else -1 for found in places]


def _by_row(tokens: ResponseTokens, rows: int) -> list[tuple[int, ...]]:
    """The token ids of each row."""
    counts = tokens.sample_N.bincount(minlength=rows).tolist()
    return [tuple(part.tolist()) for part in torch.split(tokens.target_N, counts)]
