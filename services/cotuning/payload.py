"""Logits that travel: the top K classes of a model's distributions at span starts, with explicit tail mass.

Names: N samples, S rows (span starts of all samples, in order), K classes kept, C classes.

Per row: class ids (u16, or u32 above 65,536 classes), log-probabilities in 8 bits on an affine scale from the row's
greatest downwards (float16 greatest and step), the tail's mass (float16), the byte of the response where the span
starts. Per sample: a digest of the response's bytes and the number of rows. The header names the class space
(fingerprint of the fold or of the token table), the probe set, the temperature and K. 106 bytes a row at K = 32: 53 KiB
for a response of 512 tokens.

The affine scale starts at the greatest log-probability because that is the one that must be right; a step is at most
20 / 255 nats, and after parsing the K probabilities are rescaled to one minus the tail.

A payload on private text would leak it: build one on public text only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cotuning.encoding import EncodedBatch, response_digest
from cotuning.heads import FoldedHead, Head

PAYLOAD_FORMAT = "cotune-logits/1"
MAX_TOP_K = 1024
_DEPTH_NATS = 20.0
_STEPS = 255


class PayloadError(ValueError):
    """A payload that was refused.

    Attributes:
        expected: what should have come.
        received: what came.
    """

    def __init__(self, what: str, expected: Any, received: Any) -> None:
        super().__init__(f"{what}: expected {expected}, received {received}")
        self.expected = expected
        self.received = received


@dataclass(frozen=True)
class TopClasses:
    """The K most probable classes of S distributions.

    Attributes:
        ids_SK: int64, distinct in a row, most probable first.
        log_probs_SK: float32.
        tail_S: float32, mass of all other classes.
    """

    ids_SK: Tensor
    log_probs_SK: Tensor
    tail_S: Tensor


@dataclass(frozen=True)
class PayloadRows:
    """A parsed payload: a teacher for `mutual_loss.payload_loss`.

    Attributes:
        sample_S: index of the row's sample in the probe set; ascending.
        byte_start_S: byte of the response before which the distribution stands; the response's length for END.
        ids_SK, log_probs_SK, tail_S: as in `TopClasses`; probabilities and tail sum to one.
        num_classes: C.
        temperature: at which the distributions were taken.
        fingerprint: of the class space.
    """

    sample_S: Tensor
    byte_start_S: Tensor
    ids_SK: Tensor
    log_probs_SK: Tensor
    tail_S: Tensor
    num_classes: int
    temperature: float
    fingerprint: str

    def take(self, index_S: Tensor) -> "PayloadRows":
        """The rows at `index_S`."""
        return replace(
            self,
            sample_S=self.sample_S[index_S],
            byte_start_S=self.byte_start_S[index_S],
            ids_SK=self.ids_SK[index_S],
            log_probs_SK=self.log_probs_SK[index_S],
            tail_S=self.tail_S[index_S],
        )

    def to(self, device: torch.device | str) -> "PayloadRows":
        """The same rows on `device`."""
        names = ("sample_S", "byte_start_S", "ids_SK", "log_probs_SK", "tail_S")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def top_classes(
    hidden_SD: Tensor,
    head: Head,
    *,
    k: int,
    map_V: Tensor | None = None,
    num_classes: int | None = None,
    temperature: float = 1.0,
    chunk_rows: int = 128,
) -> TopClasses:
    """The top classes of a model at S positions, projected chunk by chunk; no gradient.

    Args:
        hidden_SD: hidden states at the span starts' rows.
        head: the model's head.
        k: classes to keep, at most C of them.
        map_V: fold onto classes, None for the token ids themselves.
        num_classes: C, with `map_V`.
        temperature: of the softmax.
        chunk_rows: rows at a time.
    """
    total = head.num_tokens if num_classes is None else num_classes
    side = FoldedHead(hidden_SD.detach(), head, map_V, total, temperature=temperature, scale=0.0)
    with side.forward_only():
        parts = [keep_top(side.class_log_probs(rows), k) for rows, _ in side.chunks(chunk_rows, None)]
    if not parts:
        return keep_top(torch.zeros(0, total, device=hidden_SD.device), k)
    return TopClasses(
        torch.cat([part.ids_SK for part in parts]),
        torch.cat([part.log_probs_SK for part in parts]),
        torch.cat([part.tail_S for part in parts]),
    )


def keep_top(log_probs_SC: Tensor, k: int) -> TopClasses:
    """The `min(k, C)` greatest of each row, and the mass of the rest (summed, not subtracted)."""
    log_probs_SK, ids_SK = log_probs_SC.topk(min(k, log_probs_SC.shape[1]), dim=1)
    tail_S = log_probs_SC.exp().scatter_(1, ids_SK, 0.0).sum(1)
    return TopClasses(ids_SK, log_probs_SK.float(), tail_S.float().clamp(0, 1))


def build_payload(
    top: TopClasses,
    *,
    sample_S: Tensor,
    byte_start_S: Tensor,
    responses: Sequence[str],
    num_classes: int,
    fingerprint: str,
    probe_set: str,
    temperature: float,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Pack rows into tensors and a header of strings, as a safetensors file takes them.

    Args:
        top: S rows.
        sample_S: index of each row's sample, ascending.
        byte_start_S: byte of the response where the row's span starts, ascending within a sample.
        responses: the N responses of the probe set.
        num_classes: C.
        fingerprint: `FoldPair.fingerprint`, or `TokenTable.fingerprint` where the classes are token ids.
        probe_set: SHA-256 of the probe set's bytes, hex.
        temperature: at which `top` was taken.
    """
    ids_dtype = torch.uint16 if num_classes <= 2**16 else torch.uint32
    num_samples = len(responses)
    tensors = {
        "ids": top.ids_SK.cpu().to(ids_dtype),
        **_rounded(top.log_probs_SK.float().cpu()),
        "tail": top.tail_S.cpu().half(),
        "byte_start": byte_start_S.cpu().to(torch.uint32),
        "rows": torch.bincount(sample_S.cpu(), minlength=num_samples).to(torch.uint32),
        "digest": torch.tensor([response_digest(response) for response in responses], dtype=torch.int64),
    }
    metadata = {
        "format": PAYLOAD_FORMAT,
        "fingerprint": fingerprint,
        "probe_set": probe_set,
        "temperature": repr(float(temperature)),
        "top_k": str(top.ids_SK.shape[1]),
        "num_classes": str(num_classes),
    }
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, metadata


def _rounded(log_probs_SK: Tensor) -> dict[str, Tensor]:
    """Each row on its own scale of 256 steps, from its greatest value down to its least or `_DEPTH_NATS` below."""
    greatest_S = log_probs_SK.amax(1).half()
    least_S = log_probs_SK.amin(1).maximum(greatest_S.float() - _DEPTH_NATS)
    step_S = ((greatest_S.float() - least_S).clamp(min=0) / _STEPS).half()
    down_SK = (greatest_S.float()[:, None] - log_probs_SK) / step_S.float().clamp(min=1e-12)[:, None]
    return {
        "steps_down": down_SK.round_().clamp_(0, _STEPS).to(torch.uint8),
        "greatest": greatest_S,
        "step": step_S,
    }


def parse_payload(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    fingerprint: str,
    num_classes: int,
    probe_set: str,
    responses: Sequence[str],
) -> PayloadRows:
    """Check and unpack a payload; every field is bounded before it is used.

    Args:
        tensors: what came.
        metadata: its header.
        fingerprint: the class space that the receiver knows.
        num_classes: its size.
        probe_set: SHA-256 of the receiver's probe set.
        responses: the probe set's responses, in order.

    Raises:
        PayloadError: another format, class space or probe set; a tensor missing, of wrong dtype or shape; a class out
            of range or twice in a row; a value not finite; a tail outside [0, 1]; byte offsets out of order.
    """
    top_k, temperature = _check_header(metadata, fingerprint, num_classes, probe_set)
    checked = _check_layout(tensors, top_k, num_classes, len(responses))
    sample_S, byte_start_S = _check_places(checked, responses)
    ids_SK = checked["ids"].to(torch.int64)
    log_probs_SK, tail_S = _check_values(checked, ids_SK, num_classes)
    return PayloadRows(
        sample_S=sample_S,
        byte_start_S=byte_start_S,
        ids_SK=ids_SK,
        log_probs_SK=log_probs_SK,
        tail_S=tail_S,
        num_classes=num_classes,
        temperature=temperature,
        fingerprint=fingerprint,
    )


def _check_header(metadata: Mapping[str, str], fingerprint: str, num_classes: int, probe_set: str) -> tuple[int, float]:
    expected = {
        "format": PAYLOAD_FORMAT,
        "fingerprint": fingerprint,
        "probe_set": probe_set,
        "num_classes": str(num_classes),
    }
    for name, value in expected.items():
        if metadata.get(name) != value:
            raise PayloadError(f"header field {name!r}", repr(value), repr(metadata.get(name)))
    try:
        top_k = int(metadata.get("top_k", ""))
    except ValueError:
        top_k = -1
    if not 1 <= top_k <= min(MAX_TOP_K, num_classes):
        raise PayloadError(
            "header field 'top_k'", f"an integer in 1..{min(MAX_TOP_K, num_classes)}", repr(metadata.get("top_k"))
        )
    try:
        temperature = float(metadata.get("temperature", ""))
    except ValueError:
        temperature = -1.0
    if not 0 < temperature <= 1000:
        raise PayloadError("header field 'temperature'", "a number in (0, 1000]", repr(metadata.get("temperature")))
    return top_k, temperature


def _check_layout(tensors: Mapping[str, Tensor], top_k: int, num_classes: int, num_samples: int) -> dict[str, Tensor]:
    num_rows = len(tensors["byte_start"]) if "byte_start" in tensors and tensors["byte_start"].dim() else 0
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "ids": (torch.uint16 if num_classes <= 2**16 else torch.uint32, (num_rows, top_k)),
        "steps_down": (torch.uint8, (num_rows, top_k)),
        "greatest": (torch.float16, (num_rows,)),
        "step": (torch.float16, (num_rows,)),
        "tail": (torch.float16, (num_rows,)),
        "byte_start": (torch.uint32, (num_rows,)),
        "rows": (torch.uint32, (num_samples,)),
        "digest": (torch.int64, (num_samples,)),
    }
    if set(tensors) != set(layout):
        raise PayloadError("tensor names", sorted(layout), sorted(tensors))
    for name, (dtype, shape) in layout.items():
        tensor = tensors[name]
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise PayloadError(f"tensor {name!r}", f"{dtype} {list(shape)}", f"{tensor.dtype} {list(tensor.shape)}")
    return dict(tensors)


def _check_places(tensors: Mapping[str, Tensor], responses: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The sample and byte of each row: known responses, offsets inside them and ascending."""
    digests_N = torch.tensor([response_digest(response) for response in responses], dtype=torch.int64)
    wrong = (tensors["digest"] != digests_N).nonzero().flatten().tolist()
    if wrong:
        raise PayloadError(f"digest of sample {wrong[0]}", int(digests_N[wrong[0]]), int(tensors["digest"][wrong[0]]))
    counts_N = tensors["rows"].to(torch.int64)
    num_rows = len(tensors["byte_start"])
    if int(counts_N.sum()) != num_rows:
        raise PayloadError("rows of all samples", num_rows, int(counts_N.sum()))
    sample_S = torch.arange(len(counts_N)).repeat_interleave(counts_N)
    byte_start_S = tensors["byte_start"].to(torch.int64)
    num_bytes_S = torch.tensor([len(response.encode()) for response in responses], dtype=torch.int64)[sample_S]
    outside = (byte_start_S > num_bytes_S).nonzero().flatten().tolist()
    if outside:
        row = outside[0]
        raise PayloadError(f"byte offset of row {row}", f"at most {int(num_bytes_S[row])}", int(byte_start_S[row]))
    if num_rows > 1:
        falls = ((sample_S[1:] == sample_S[:-1]) & (byte_start_S[1:] <= byte_start_S[:-1])).nonzero().flatten()
        if len(falls):
            row = int(falls[0]) + 1
            raise PayloadError(
                f"byte offset of row {row}", f"more than {int(byte_start_S[row - 1])}", int(byte_start_S[row])
            )
    return sample_S, byte_start_S


def _check_values(tensors: Mapping[str, Tensor], ids_SK: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities and tails that sum to one in every row."""
    if ids_SK.numel() and int(ids_SK.max()) >= num_classes:
        raise PayloadError("class id", f"less than {num_classes}", int(ids_SK.max()))
    ordered_SK = ids_SK.sort(1).values
    twice = (ordered_SK[:, 1:] == ordered_SK[:, :-1]).nonzero().tolist()
    if twice:
        raise PayloadError(
            f"class ids of row {twice[0][0]}", "distinct ids", f"{int(ordered_SK[tuple(twice[0])])} twice"
        )
    for name in ("greatest", "step", "tail"):
        bad = (~tensors[name].isfinite()).nonzero().flatten().tolist()
        if bad:
            raise PayloadError(f"{name!r} of row {bad[0]}", "a finite value", float(tensors[name][bad[0]]))
    limits = {"greatest": (-1e4, 1e-3), "step": (0.0, 1.0), "tail": (0.0, 1.0)}
    for name, (low, high) in limits.items():
        values_S = tensors[name].float()
        bad = ((values_S < low) | (values_S > high)).nonzero().flatten().tolist()
        if bad:
            raise PayloadError(f"{name!r} of row {bad[0]}", f"a value in [{low}, {high}]", float(values_S[bad[0]]))
    tail_S = tensors["tail"].float()
    if ids_SK.shape[1] == num_classes:
        tail_S = torch.zeros_like(tail_S)  # nothing is left for a tail
    steps_SK = tensors["steps_down"].float() * tensors["step"].float()[:, None]
    log_probs_SK = (tensors["greatest"].float()[:, None] - steps_SK).log_softmax(1)
    return log_probs_SK + torch.log1p(-tail_S.clamp(max=1 - 1e-6))[:, None], tail_S


@dataclass(frozen=True)
class PayloadMatch:
    """Where a payload's rows are found in a student's batch.

    Attributes:
        batch_row_S: row of the batch.
        position_S: position whose logits stand at the payload row's byte.
        payload_row_S: index for `PayloadRows.take`.
    """

    batch_row_S: Tensor
    position_S: Tensor
    payload_row_S: Tensor


def match_rows(payload: PayloadRows, batch: EncodedBatch, samples_B: Tensor) -> PayloadMatch:
    """Find the payload's rows at the token boundaries of a batch of probe samples.

    Args:
        payload: the teacher.
        batch: the student's encoding of some samples of the probe set.
        samples_B: which sample each of its rows is.
    """
    counts_N = torch.bincount(payload.sample_S, minlength=int(samples_B.max()) + 1 if len(samples_B) else 0)
    first_N = counts_N.cumsum(0) - counts_N
    counts_B = counts_N[samples_B]
    batch_row_J = torch.arange(len(samples_B), device=samples_B.device).repeat_interleave(counts_B)
    within_J = torch.arange(len(batch_row_J), device=samples_B.device) - (counts_B.cumsum(0) - counts_B)[batch_row_J]
    payload_row_J = first_N[samples_B][batch_row_J] + within_J
    byte_J = payload.byte_start_S[payload_row_J].minimum(batch.num_bytes_B[batch_row_J])
    position_J = batch.closing_positions()[batch.first_bytes()[batch_row_J] + byte_J]
    position_J = position_J.where(batch.aligned_B[batch_row_J], -1)
    found_J = position_J >= 0
    return PayloadMatch(batch_row_J[found_J], position_J[found_J], payload_row_J[found_J])
