"""Logits that travel: the top K classes of a model's distributions at span starts, with explicit tail mass.

Names: N samples, S rows (span starts of all samples, in order), K classes kept, C classes.

Per row: the set of class ids (`packed_ids`), their log-probabilities in the order of the ids, and the tail's mass
(float16). Per byte of the responses one bit, whether a span starts there. Per sample a digest of the response's bytes.
The header names the class space (fingerprint of the fold or of the token table), the probe set, the temperature, K and
how values are written. A row of 32 classes out of 32,000 takes 84 bytes: 43 KiB for a response of 512 tokens.

Values are written as what a log-probability lies below the row's greatest, at most 20 nats (less than 2.1e-9 of its
probability; what lies deeper is raised to that). After parsing the K probabilities are rescaled to one minus the tail,
so the greatest itself need not travel. With a row's range r <= 20 nats, the difference of its greatest and its least:

- `int8`: 256 even steps, the step in float16. A value errs by at most half a step; after rescaling, a log-probability
  given that the class is one of the K errs by at most a step, r / 254 + 2e-5, so by at most 0.079 nats.
- `float16`: a value d nats down errs by at most d / 2048; after rescaling by at most r / 1024 + 2e-5, so 0.02 nats. The
  greatest ones, which carry the mass, are next to exact. K - 2 bytes a row more.

The tail errs by at most 2^-12 (float16 below one).

A payload on private text would leak it: build one on public text only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from cotuning.encoding import EncodedBatch, response_digest
from cotuning.packed_ids import pack_bits, pack_ids, packed_widths, unpack_bits, unpack_ids
from cotuning.top_classes import TopClasses

PAYLOAD_FORMAT = "cotune-logits/2"
MAX_TOP_K = 1024
Values = Literal["int8", "float16"]
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
    values: Values = "int8",
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
        values: how log-probabilities are written; the module's docstring has the errors.

    Raises:
        ValueError: two rows at one byte, or a row at none.
    """
    ids_SK, order_SK = top.ids_SK.cpu().sort(1)
    low_SW, high_SW = pack_ids(ids_SK, num_classes)
    tensors = {
        "ids_low": low_SW,
        "ids_high": high_SW,
        **_rounded(top.log_probs_SK.float().cpu().gather(1, order_SK), values),
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


def _rounded(log_probs_SK: Tensor, values: Values) -> dict[str, Tensor]:
    """How far each value lies below its row's greatest: on the row's own scale of 256 steps, or as float16."""
    greatest_S1 = log_probs_SK.amax(1, keepdim=True)
    down_SK = (greatest_S1 - log_probs_SK).clamp(0, _DEPTH_NATS)
    if values == "float16":
        return {"down": down_SK.half()}
    step_S = (down_SK.amax(1) / _STEPS).half()
    steps_SK = (down_SK / step_S.float().clamp(min=1e-12)[:, None]).round_().clamp_(0, _STEPS)
    return {"steps_down": steps_SK.to(torch.uint8), "step": step_S}


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
    ids_SK = _check_ids(checked, header.top_k, num_classes)
    log_probs_SK, tail_S = _check_values(checked, header.values, whole=header.top_k == num_classes)
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
    low_width, high_width = packed_widths(header.top_k, num_classes)
    written: dict[str, tuple[torch.dtype, tuple[int, ...]]] = (
        {"down": (torch.float16, (num_rows, header.top_k))}
        if header.values == "float16"
        else {"steps_down": (torch.uint8, (num_rows, header.top_k)), "step": (torch.float16, (num_rows,))}
    )
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "ids_low": (torch.uint8, (num_rows, low_width)),
        "ids_high": (torch.uint8, (num_rows, high_width)),
        **written,
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


def _check_ids(tensors: Mapping[str, Tensor], top_k: int, num_classes: int) -> Tensor:
    try:
        return unpack_ids(tensors["ids_low"], tensors["ids_high"], top_k, num_classes)
    except ValueError as error:
        detail, row = error.args
        expected, _, received = detail.partition(", got ")
        raise PayloadError(f"class ids of row {row}", expected, received) from None


def _check_values(tensors: Mapping[str, Tensor], values: Values, *, whole: bool) -> tuple[Tensor, Tensor]:
    """Log-probabilities, in the order of the ids, and tails that sum to one in every row.

    Args:
        whole: every class is among the K, so that nothing is left for a tail.
    """
    limits = {"tail": 1.0} | ({"down": _DEPTH_NATS} if values == "float16" else {"step": 1.0})
    for name, high in limits.items():
        came = tensors[name].float()
        for place in (~((came >= 0) & (came <= high))).nonzero().tolist()[:1]:
            raise PayloadError(f"{name!r} of row {place[0]}", f"a value in [0, {high:g}]", float(came[tuple(place)]))
    tail_S = torch.zeros_like(tensors["tail"], dtype=torch.float32) if whole else tensors["tail"].float()
    if values == "float16":
        down_SK = tensors["down"].float()
    else:
        down_SK = tensors["steps_down"].float() * tensors["step"].float()[:, None]
    return (-down_SK).log_softmax(1) + torch.log1p(-tail_S.clamp(max=1 - 1e-6))[:, None], tail_S


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
