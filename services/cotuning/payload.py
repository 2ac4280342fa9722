"""Logits that travel: the top K classes of a model's distributions at span starts, with explicit tail mass.

Names: N samples, S rows (span starts of all samples, in order), K classes kept, C classes.

Per row: the set of class ids (`packed_ids`), their log-probabilities in the order of the ids (`packed_values`, which
states how far each form errs), and the tail's mass (float16, which errs by at most 2^-12). Per byte of the responses
one bit, whether a span starts there. Per sample a digest of the response's bytes. The header names the class space
(fingerprint of the fold or of the token table), the probe set, the temperature, K and how values are written. At K = 32
a row takes 79 bytes over 32,000 classes and 88 over 151,936: 45 KiB for a response of 512 tokens.

A payload on private text would leak it: build one on public text only.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast, get_args

import torch
from torch import Tensor

from cotuning.encoding import EncodedBatch, response_digest
from cotuning.packed_ids import pack_bits, pack_ids, packed_width, unpack_bits, unpack_ids
from cotuning.packed_values import Values, pack_values, unpack_values, values_layout
from cotuning.top_classes import TopClasses

PAYLOAD_FORMAT = "cotune-logits/3"
MAX_TOP_K = 1024


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
    values: Values = "int7",
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
        values: how log-probabilities are written; `packed_values` has the errors.

    Raises:
        ValueError: two rows at one byte, or a row at none.
    """
    ids_SK, order_SK = top.ids_SK.cpu().sort(1)
    tensors = {
        "ids": pack_ids(ids_SK, num_classes),
        "values": pack_values(top.log_probs_SK.float().cpu().gather(1, order_SK), values),
        "tail": top.tail_S.cpu().half(),
        "starts": _pack_places(sample_S.cpu(), byte_start_S.cpu(), responses),
        "digest": torch.tensor([response_digest(response) for response in responses], dtype=torch.int64),
    }
    metadata = {
        "format": PAYLOAD_FORMAT,
        "fingerprint": fingerprint,
        "probe_set": probe_set,
        "temperature": repr(float(temperature)),
        "top_k": str(top.ids_SK.shape[1]),
        "values": values,
        "num_classes": str(num_classes),
    }
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, metadata


def _places_of_samples(responses: Sequence[str]) -> Tensor:
    """Index [N + 1] of each sample's first bit in `starts`: one for each byte and one for the end, sample by sample."""
    sizes_N = torch.tensor([0, *(len(response.encode()) + 1 for response in responses)], dtype=torch.int64)
    return sizes_N.cumsum(0)


def _pack_places(sample_S: Tensor, byte_start_S: Tensor, responses: Sequence[str]) -> Tensor:
    firsts_N = _places_of_samples(responses)
    place_S = firsts_N[sample_S] + byte_start_S
    outside_S = (byte_start_S < 0) | (place_S >= firsts_N[sample_S + 1])
    if bool(outside_S.any()) or bool((place_S[1:] <= place_S[:-1]).any()):
        raise ValueError("expected rows at ascending bytes of their responses, got others")
    total = int(firsts_N[-1])
    starts_T = torch.zeros(total, dtype=torch.bool).index_fill_(0, place_S, True)
    return pack_bits(starts_T[None], -(-total // 8))[0]


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
        PayloadError: another format, class space or probe set; a tensor missing, of wrong dtype or shape; class ids
            that are no set of K in range; a value or a tail out of its range; other rows than places.
    """
    header = _check_header(metadata, fingerprint, num_classes, probe_set)
    firsts_N = _places_of_samples(responses)
    checked = _check_layout(tensors, header, num_classes, firsts_N)
    sample_S, byte_start_S = _check_places(checked, responses, firsts_N)
    ids_SK = _unpacked("class ids", unpack_ids, checked["ids"], header.top_k, num_classes)
    down_SK = _unpacked("values", unpack_values, checked["values"], header.top_k, header.values)
    tail_S = _check_tail(checked["tail"], whole=header.top_k == num_classes)
    log_probs_SK = (-down_SK).log_softmax(1) + torch.log1p(-tail_S.clamp(max=1 - 1e-6))[:, None]
    log_probs_SK, order_SK = log_probs_SK.sort(dim=1, descending=True, stable=True)
    return PayloadRows(
        sample_S=sample_S,
        byte_start_S=byte_start_S,
        ids_SK=ids_SK.gather(1, order_SK),
        log_probs_SK=log_probs_SK,
        tail_S=tail_S,
        num_classes=num_classes,
        temperature=header.temperature,
        fingerprint=fingerprint,
    )


@dataclass(frozen=True)
class _Header:
    top_k: int
    temperature: float
    values: Values


def _check_header(metadata: Mapping[str, str], fingerprint: str, num_classes: int, probe_set: str) -> _Header:
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
    values = metadata.get("values")
    if values not in get_args(Values):
        raise PayloadError("header field 'values'", f"one of {', '.join(get_args(Values))}", repr(values))
    return _Header(top_k, temperature, cast("Values", values))


def _check_layout(
    tensors: Mapping[str, Tensor], header: _Header, num_classes: int, firsts_N: Tensor
) -> dict[str, Tensor]:
    num_rows = len(tensors["tail"]) if "tail" in tensors and tensors["tail"].dim() else 0
    values_dtype, values_width = values_layout(header.top_k, header.values)
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "ids": (torch.uint8, (num_rows, packed_width(header.top_k, num_classes))),
        "values": (values_dtype, (num_rows, values_width)),
        "tail": (torch.float16, (num_rows,)),
        "starts": (torch.uint8, (-(-int(firsts_N[-1]) // 8),)),
        "digest": (torch.int64, (len(firsts_N) - 1,)),
    }
    if set(tensors) != set(layout):
        raise PayloadError("tensor names", sorted(layout), sorted(tensors))
    for name, (dtype, shape) in layout.items():
        tensor = tensors[name]
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise PayloadError(f"tensor {name!r}", f"{dtype} {list(shape)}", f"{tensor.dtype} {list(tensor.shape)}")
    return dict(tensors)


def _check_places(tensors: Mapping[str, Tensor], responses: Sequence[str], firsts_N: Tensor) -> tuple[Tensor, Tensor]:
    """The sample and byte of each row: known responses, as many places as rows. Bits cannot be out of order."""
    digests_N = torch.tensor([response_digest(response) for response in responses], dtype=torch.int64)
    wrong = (tensors["digest"] != digests_N).nonzero().flatten().tolist()
    if wrong:
        raise PayloadError(f"digest of sample {wrong[0]}", int(digests_N[wrong[0]]), int(tensors["digest"][wrong[0]]))
    place_S = unpack_bits(tensors["starts"][None])[0].nonzero().flatten()
    num_rows = len(tensors["tail"])
    if len(place_S) != num_rows:
        raise PayloadError("rows of all samples", num_rows, len(place_S))
    if num_rows and int(place_S[-1]) >= int(firsts_N[-1]):
        raise PayloadError("last place of a row", f"less than {int(firsts_N[-1])}", int(place_S[-1]))
    sample_S = torch.searchsorted(firsts_N, place_S, right=True) - 1
    return sample_S, place_S - firsts_N[sample_S]


def _unpacked(what: str, unpack: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """`unpack(*arguments)`, whose ValueError of what was expected, what it got and the row becomes a refusal."""
    try:
        return unpack(*arguments)
    except ValueError as error:
        detail, row = error.args
        expected, _, received = detail.partition(", got ")
        raise PayloadError(f"{what} of row {row}", expected, received) from None


def _check_tail(tail_S: Tensor, *, whole: bool) -> Tensor:
    """The tails as float32.

    Args:
        tail_S: what came.
        whole: every class is among the K, so that nothing is left for a tail.
    """
    came_S = tail_S.float()
    for row in (~((came_S >= 0) & (came_S <= 1))).nonzero().flatten().tolist()[:1]:
        raise PayloadError(f"'tail' of row {row}", "a value in [0, 1]", float(came_S[row]))
    return torch.zeros_like(came_S) if whole else came_S


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
