"""The proxy's distributions on the public probe set: what a device computes, and what the server makes of it.

A probe row that a device answers well is worth learning from: FedMKT (arXiv 2406.02224, algorithm 2) keeps, for each
row, the client with the least cross-entropy, `argmin_i CE_i`, and only if it is below the model's own. The alternative
here, a mixture weighted by `softmax(-CE_i)`, is ours. Distributions are over the proxy's own token ids, at the starts
of its own tokens and at END.

A device says nothing about its own quality: the server computes its cross-entropy from the distributions that would be
taught, at every place where they have to be. So a device cannot be chosen for a row on its word, or for the easy half
of it.

Names: N probe rows, S span starts, K classes kept, C classes, B rows of a batch.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from cotuning.alignment import Alignment, align
from cotuning.cross_entropy import cross_entropy, response_tokens
from cotuning.encoded_rows import EncodedRows
from cotuning.encoding import EncodedBatch
from cotuning.examples import Example, rows_digest
from cotuning.language_model import LanguageModel, hidden_states, output_head
from cotuning.mutual_learning import Teacher
from cotuning.packed_values import Values
from cotuning.payload import PayloadError, PayloadRows, build_payload, parse_payload
from cotuning.top_classes import TopClasses, top_classes
from cotuning.vocabulary import Reads

TeacherChoice = Literal["least_ce", "ce_weighted", "off"]

_ROWS_AT_ONCE = 32
_LEAST_TAIL = 2.0**-25
"""Half of the least tail that a payload can tell from zero (float16)."""


@dataclass(frozen=True)
class ProbePlaces:
    """Where a model's distributions on the probe set stand, and the token that follows each.

    Attributes:
        sample_S: index of the probe row; ascending.
        byte_start_S: byte of its response; ascending within a row.
        target_S: token id, END at the end of a response that was not cut.
    """

    sample_S: Tensor
    byte_start_S: Tensor
    target_S: Tensor


def probe_places(lm: Reads, probe: Sequence[Example], *, max_length: int) -> ProbePlaces:
    """Where `probe_payload` of the same model, rows and length has its rows. On the CPU; the model is not run."""
    samples, starts, targets = [], [], []
    for batch, spans, first in _spans_by_batch(lm, probe, max_length):
        samples.append(spans.sample_S.cpu() + first)
        starts.append(spans.byte_start_S.cpu())
        targets.append(batch.labels_BT[spans.sample_S, spans.row_a_S + 1].cpu())
    return ProbePlaces(torch.cat(samples), torch.cat(starts), torch.cat(targets))


def _spans_by_batch(
    lm: Reads, probe: Sequence[Example], max_length: int
) -> Iterator[tuple[EncodedBatch, Alignment, int]]:
    """Batches of the probe set, the starts of their own tokens, and the index of each batch's first row.

    Raises:
        ValueError: no probe rows.
    """
    if not probe:
        raise ValueError("expected at least one probe row, got none")
    rows = EncodedRows(lm, probe, max_length=max_length)
    for first in range(0, len(probe), _ROWS_AT_ONCE):
        batch = rows.batch(range(first, min(first + _ROWS_AT_ONCE, len(probe))))
        yield batch, align(batch, batch), first


@torch.no_grad()
def row_losses(lm: LanguageModel, examples: Sequence[Example], *, max_length: int) -> Tensor:
    """The cross-entropy per response token of each row, nats: float32 [N], CPU."""
    rows = EncodedRows(lm, examples, max_length=max_length)
    head = output_head(lm)
    losses: list[Tensor] = []
    for start in range(0, len(examples), _ROWS_AT_ONCE):
        chosen = range(start, min(start + _ROWS_AT_ONCE, len(examples)))
        batch = rows.batch(chosen)
        tokens = response_tokens(batch)
        hidden_BTD = hidden_states(lm, batch.input_ids_BT)
        _, losses_S = cross_entropy(hidden_BTD[tokens.sample_N, tokens.position_N], head, tokens.target_N)
        losses.append(_mean_by_row(losses_S, tokens.sample_N, len(chosen)))
    return torch.cat(losses) if losses else torch.zeros(0)


@torch.no_grad()
def probe_payload(
    proxy: LanguageModel,
    probe: Sequence[Example],
    *,
    top_k: int,
    temperature: float,
    max_length: int,
    values: Values = "int7",
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The top classes of the proxy, as it stands, at every token start of the probe rows' responses.

    Args:
        proxy: with the adapters on that shall speak.
        probe: public rows; never private ones.

    Returns:
        Tensors and header as `payload.build_payload` gives them.

    Raises:
        ValueError: no probe rows.
    """
    head = output_head(proxy)
    tops: list[TopClasses] = []
    samples: list[Tensor] = []
    starts: list[Tensor] = []
    for batch, spans, first in _spans_by_batch(proxy, probe, max_length):
        hidden_BTD = hidden_states(proxy, batch.input_ids_BT)
        hidden_SD = hidden_BTD[spans.sample_S, spans.row_a_S]
        tops.append(top_classes(hidden_SD, head, k=top_k, temperature=temperature))
        samples.append(spans.sample_S + first)
        starts.append(spans.byte_start_S)
    top = TopClasses(
        torch.cat([each.ids_SK for each in tops]),
        torch.cat([each.log_probs_SK for each in tops]),
        torch.cat([each.tail_S for each in tops]),
    )
    return build_payload(
        top,
        sample_S=torch.cat(samples),
        byte_start_S=torch.cat(starts),
        responses=[example.output for example in probe],
        num_classes=proxy.table.num_tokens,
        fingerprint=proxy.table.fingerprint,
        probe_set=rows_digest(probe),
        temperature=temperature,
        values=values,
    )


def parse_probe_payload(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    proxy: Reads,
    probe: Sequence[Example],
    places: ProbePlaces,
    top_k: int,
    temperature: float,
) -> PayloadRows:
    """Check a device's payload against what it was asked for.

    Args:
        tensors: what came.
        metadata: its header.
        proxy: over whose token ids they are said to be.
        probe: Q.
        places: of the proxy on Q, from `probe_places`.
        top_k: K asked for.
        temperature: asked for.

    Raises:
        PayloadError: see `payload.parse_payload`; or another K, temperature or set of places than asked for.
    """
    payload = parse_payload(
        tensors,
        metadata,
        fingerprint=proxy.table.fingerprint,
        num_classes=proxy.table.num_tokens,
        probe_set=rows_digest(probe),
        responses=[example.output for example in probe],
    )
    expected = min(top_k, proxy.table.num_tokens)
    if payload.ids_SK.shape[1] != expected:
        raise PayloadError("classes kept of each distribution", expected, payload.ids_SK.shape[1])
    if payload.temperature != temperature:
        raise PayloadError("temperature", temperature, payload.temperature)
    for what, wanted_S, came_S in (
        ("probe row of each distribution", places.sample_S, payload.sample_S),
        ("byte offsets of the distributions", places.byte_start_S, payload.byte_start_S),
    ):
        if len(wanted_S) != len(came_S):
            raise PayloadError("number of distributions", len(wanted_S), len(came_S))
        other = (wanted_S != came_S).nonzero().flatten().tolist()
        if other:
            raise PayloadError(f"{what}, at row {other[0]}", int(wanted_S[other[0]]), int(came_S[other[0]]))
    return payload


def payload_losses(payload: PayloadRows, places: ProbePlaces, num_rows: int) -> Tensor:
    """The cross-entropy per response token of each probe row, nats, of what a payload would teach.

    A token that is not among the K kept has an equal share of the tail's mass. Distributions of another temperature
    are brought back to 1, with the same view of the tail: `p_1 ~ p_T^T`.

    Args:
        payload: rows at `places`.
        places: and the tokens that follow them.
        num_rows: N.

    Returns:
        Float32 [N]; NaN for a row without places.
    """
    rest = payload.num_classes - payload.ids_SK.shape[1]
    log_share_S = payload.tail_S.clamp(min=_LEAST_TAIL).log() - math.log(max(rest, 1))
    log_probs_SK = payload.log_probs_SK * payload.temperature
    log_share_S = log_share_S * payload.temperature if rest else torch.full_like(log_share_S, -torch.inf)
    log_tail_S = log_share_S + math.log(max(rest, 1))
    log_total_S = torch.logsumexp(torch.cat([log_probs_SK, log_tail_S[:, None]], 1), 1)
    kept_SK = payload.ids_SK == places.target_S[:, None]
    log_kept_S = log_probs_SK.where(kept_SK, -torch.inf).amax(1)
    log_target_S = torch.where(kept_SK.any(1), log_kept_S, log_share_S) - log_total_S
    return _mean_by_row(-log_target_S, places.sample_S, num_rows)


def least_payload_losses(payload: PayloadRows, places: ProbePlaces, num_rows: int) -> Tensor:
    """The least cross-entropy per response token, nats, that a model with these distributions can have on each row.

    A token that is not among the K kept is at most as likely as the least of them, and as the whole tail. At another
    temperature than 1 nothing is known: 0.

    Args: as for `payload_losses`.

    Returns:
        Float32 [N], up to what the payload's values err; NaN for a row without places.
    """
    kept_SK = payload.ids_SK == places.target_S[:, None]
    log_kept_S = payload.log_probs_SK.where(kept_SK, -torch.inf).amax(1)
    log_most_S = torch.minimum(payload.log_probs_SK.amin(1), (payload.tail_S + 2.0**-12).log())
    log_target_S = torch.where(kept_SK.any(1), log_kept_S, log_most_S).clamp(max=0)
    if payload.temperature != 1:
        log_target_S = torch.zeros_like(log_target_S)
    return _mean_by_row(-log_target_S, places.sample_S, num_rows)


def choose_teachers(losses_DN: Tensor, own_losses_N: Tensor, mode: TeacherChoice) -> Tensor:
    """How much each device teaches one student on each probe row.

    Args:
        losses_DN: each device's cross-entropy of each row, from `payload_losses`.
        own_losses_N: the student's.
        mode: `least_ce`: the best device; `ce_weighted`: every device that beats the student, by softmax(-CE).

    Returns:
        Weights [devices, N]: of each row they sum to one, or to zero where no device beats the student.
    """
    if mode == "off" or not len(losses_DN):
        return torch.zeros(losses_DN.shape)
    beats_DN = losses_DN < own_losses_N  # NaN, a row without a loss, beats nothing
    losses_DN = losses_DN.where(beats_DN, torch.inf)
    taught_N = beats_DN.any(0)
    if mode == "ce_weighted":
        weights_DN = torch.softmax(-losses_DN, 0)
    else:
        weights_DN = torch.nn.functional.one_hot(losses_DN.argmin(0), len(losses_DN)).T.float()
    return torch.where(taught_N, weights_DN, torch.zeros_like(weights_DN))


def make_teacher(
    payloads: Sequence[PayloadRows], weights_DN: Tensor, row_of_sample: Mapping[int, int], *, weight: float
) -> Teacher | None:
    """One teacher of all devices' rows that have a weight; None if there are none.

    Args:
        payloads: one a device, of the same K.
        weights_DN: from `choose_teachers`.
        row_of_sample: probe row -> index of the training row.
        weight: of the term in the student's objective.
    """
    kept = [(weights_DN[place][payload.sample_S] > 0).nonzero().flatten() for place, payload in enumerate(payloads)]
    parts = [payload.take(index_S) for payload, index_S in zip(payloads, kept, strict=True)]
    weights_S = torch.cat([weights_DN[place][part.sample_S] for place, part in enumerate(parts)] or [torch.zeros(0)])
    if not len(weights_S):
        return None
    sample_S = torch.cat([part.sample_S for part in parts])
    order_S = sample_S.argsort(stable=True)
    merged = replace(
        parts[0],
        sample_S=sample_S,
        byte_start_S=torch.cat([part.byte_start_S for part in parts]),
        ids_SK=torch.cat([part.ids_SK for part in parts]),
        log_probs_SK=torch.cat([part.log_probs_SK for part in parts]),
        tail_S=torch.cat([part.tail_S for part in parts]),
    )
    taught = {row_of_sample[sample]: sample for sample in sorted(set(sample_S.tolist()))}
    return Teacher(merged.take(order_S), weights_S[order_S], taught, weight)


def device_teachers(
    students: Mapping[str, LanguageModel],
    proxy: LanguageModel,
    probe: Sequence[Example],
    payloads: Sequence[PayloadRows],
    *,
    max_length: int,
    mode: TeacherChoice,
    weight: float,
    first_row: int,
) -> tuple[dict[str, Teacher | None], dict[str, list[int]]]:
    """The devices' logits as a teacher of each student that has the proxy's tokenizer.

    Args:
        students: by name, with their adapters on.
        proxy: whose distributions the payloads are.
        probe: Q.
        payloads: from `parse_probe_payload`, one a device.
        max_length: tokens of a probe row, as the devices were told.
        mode: see `choose_teachers`.
        weight: of the term in a student's objective; with 0 nobody is taught.
        first_row: index of Q's first row among the training rows.

    Returns:
        For each student the teacher, None where there is none; and on how many rows each device teaches it.
    """
    teachers: dict[str, Teacher | None] = dict.fromkeys(students)
    rows_taught = {name: [0] * len(payloads) for name in students}
    if not payloads or mode == "off" or not weight:
        return teachers, rows_taught
    places = probe_places(proxy, probe, max_length=max_length)
    losses_DN = torch.stack([payload_losses(payload, places, len(probe)) for payload in payloads])
    row_of_sample = {sample: first_row + sample for sample in range(len(probe))}
    for name, student in students.items():
        if student.table.fingerprint != proxy.table.fingerprint:
            continue
        weights_DN = choose_teachers(losses_DN, row_losses(student, probe, max_length=max_length), mode)
        placed = [payload.to(student.device) for payload in payloads]
        teachers[name] = make_teacher(placed, weights_DN.to(student.device), row_of_sample, weight=weight)
        rows_taught[name] = torch.count_nonzero(weights_DN, 1).tolist()
    return teachers, rows_taught


def _mean_by_row(losses_S: Tensor, sample_S: Tensor, num_rows: int) -> Tensor:
    sums_B = torch.zeros(num_rows, dtype=torch.float64, device=losses_S.device)
    counts_B = torch.bincount(sample_S, minlength=num_rows)
    sums_B = sums_B.index_add_(0, sample_S, losses_S.double())
    return (sums_B / counts_B.clamp(min=1)).where(counts_B > 0, torch.nan).float().cpu()
