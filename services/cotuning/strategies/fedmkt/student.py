"""A model that learns from others' logits on the probe set: the same on devices and on the server."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cotuning.cross_entropy import response_tokens
from cotuning.encoded_rows import EncodedRows
from cotuning.examples import Example
from cotuning.language_model import LanguageModel
from cotuning.payload import PayloadError
from cotuning.probe_logits import (
    choose_teachers,
    least_payload_losses,
    parse_probe_payload,
    payload_losses,
    probe_payload,
    probe_places,
    row_losses,
)
from cotuning.received_logits import Received, make_lessons, require_alignment
from cotuning.shared_rows import AlignmentStats
from cotuning.training import draw_batches, row_sizes
from cotuning.transfer import transfer_steps
from cotuning.tuning import AdapterTraining, train_adapter
from cotuning.vocabulary import Reads
from protocol.strategies import FedMktSettings, LocalTraining, ServerSteps

_TOLERATED_NATS = 0.25


def parse_logits(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    vocabulary: Reads,
    probe: Sequence[Example],
    settings: FedMktSettings,
) -> Received:
    """Check what a party sent; the same in both directions.

    Its losses must be some that a model with its distributions can have, within a quarter of a nat: more than any form
    of a payload's values errs.

    Args:
        tensors: what came.
        metadata: its header.
        vocabulary: the sender's.
        probe: Q.
        settings: of the strategy.

    Raises:
        PayloadError: another tokenizer, probe set, K or temperature, values that cannot be distributions, or losses
            that contradict them.
    """
    places = probe_places(vocabulary, probe, max_length=settings.server.max_length)
    payload = parse_probe_payload(
        {name: tensor for name, tensor in tensors.items() if name != "losses"},
        metadata,
        proxy=vocabulary,
        probe=probe,
        places=places,
        top_k=settings.top_k,
        temperature=settings.temperature,
    )
    losses_N = _check_losses(tensors.get("losses"), least_payload_losses(payload, places, len(probe)))
    return Received(payload, vocabulary, places, losses_N)


def _check_losses(losses_N: Tensor | None, least_N: Tensor) -> Tensor:
    received = "none" if losses_N is None else f"{losses_N.dtype} {list(losses_N.shape)}"
    if losses_N is None or losses_N.dtype != torch.float32 or losses_N.shape != least_N.shape:
        raise PayloadError("tensor 'losses'", f"{torch.float32} {list(least_N.shape)}", received)
    wrong_N = ~(losses_N.isfinite() & (losses_N >= least_N - _TOLERATED_NATS)) & ~least_N.isnan()
    for row in wrong_N.nonzero().flatten().tolist()[:1]:
        raise PayloadError(
            f"loss of row {row}", f"a number of at least {float(least_N[row]):.3g}", float(losses_N[row])
        )
    return losses_N


def select_rows(losses_DN: Tensor, own_losses_N: Tensor) -> dict[int, int]:
    """Which rows are kept, and the index of who teaches each: the least loss, where it is below the student's own.

    FedMKT, algorithm 2 (DualMinCE): `argmin_k CE_k`, and `CE_k < CE_own`.

    Args:
        losses_DN: of each teacher on each row.
        own_losses_N: the student's.

    Raises:
        ValueError: unlike numbers of rows.
    """
    if losses_DN.dim() != 2 or losses_DN.shape[1:] != own_losses_N.shape:
        raise ValueError(
            f"expected losses of each teacher on each of {len(own_losses_N)} rows, got shape {list(losses_DN.shape)}"
        )
    finite_DN = losses_DN.float().where(losses_DN.isfinite(), math.nan)
    own_N = own_losses_N.float().where(own_losses_N.isfinite(), math.nan)
    weights_DN = choose_teachers(finite_DN, own_N, "least_ce")
    return {row: int(weights_DN[:, row].argmax()) for row in weights_DN.any(0).nonzero().flatten().tolist()}


class Student:
    """A model that learns from others' logits on the probe set, on a device or on the server."""

    def __init__(self, lm: LanguageModel, adapter: str, probe: Sequence[Example], settings: FedMktSettings) -> None:
        self.lm, self.settings = lm, settings
        self._adapter, self._probe = adapter, probe
        self._max_length = settings.server.max_length
        self._rows = EncodedRows(lm, probe, max_length=self._max_length)

    @property
    def betas(self) -> tuple[float, float]:
        """AdamW's."""
        return 0.9, self.settings.adam_beta2

    def alignments(self, received: Sequence[Received]) -> list[AlignmentStats]:
        """Of every sender's tokens with the student's; nothing where the alignment has no such measure."""
        if self.settings.token_alignment != "fold":
            return []
        return [
            require_alignment(
                self._rows,
                sender.vocabulary,
                self._probe,
                max_length=self._max_length,
                min_coverage=self.settings.min_coverage,
            )
            for sender in received
        ]

    def teachers(self, received: Sequence[Received]) -> dict[int, int]:
        """See `select_rows`."""
        own_N = row_losses(self.lm, self._probe, max_length=self._max_length)
        losses = [self._losses(sender) for sender in received]
        losses_DN = torch.stack(losses) if losses else torch.zeros(0, len(self._probe))
        if self.settings.selection_unit == "byte":
            own_N = own_N * self._tokens_per_byte(response_tokens(self._rows.batch(range(len(self._probe)))).sample_N)
            for place, sender in enumerate(received):
                losses_DN[place] *= self._tokens_per_byte(sender.places.sample_S)
        return select_rows(losses_DN, own_N)

    def _losses(self, sender: Received) -> Tensor:
        if self.settings.losses == "sent":
            return sender.losses_N.clone()
        return payload_losses(sender.payload, sender.places, len(self._probe))

    def _tokens_per_byte(self, sample_S: Tensor) -> Tensor:
        tokens_N = torch.bincount(sample_S.cpu(), minlength=len(self._probe))
        return tokens_N / torch.tensor([max(len(row.output.encode()), 1) for row in self._probe])

    def learn(
        self,
        received: Sequence[Received],
        teacher_of_row: Mapping[int, int],
        how: LocalTraining | ServerSteps,
        *,
        steps: int,
        row_seed: int,
        options: AdapterTraining,
    ) -> dict[str, float]:
        """Train on the rows kept; their losses, empty where there are none."""
        kept = sorted(teacher_of_row) if self.settings.transfer_rows == "kept" else list(range(len(self._probe)))
        if not kept or not steps:
            return {}
        places = draw_batches(
            row_sizes([self._probe[row] for row in kept]), batch_size=how.batch_size, steps=steps, seed=row_seed
        )
        step_at = transfer_steps(
            self.lm,
            self._adapter,
            self._rows,
            [[kept[place] for place in batch] for batch in places],
            make_lessons(
                self.settings.token_alignment, self._rows, received, teacher_of_row, max_length=self._max_length
            ),
            ce_weight=self.settings.ce_weight,
            precision=how.precision,
            micro_batch_size=how.micro_batch_size,
        )
        losses = train_adapter(self.lm, self._adapter, step_at, steps=steps, **options)
        names = {"cross_entropy": "ce"}
        return {f"{self._adapter}_transfer_{names.get(name, name)}": value for name, value in losses.items()}

    def payload(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What the student says on the probe set, as it stands: distributions, and the loss of each row."""
        tensors, metadata = probe_payload(
            self.lm,
            self._probe,
            top_k=self.settings.top_k,
            temperature=self.settings.temperature,
            values=self.settings.logits_values,
            max_length=self._max_length,
        )
        return tensors | {"losses": row_losses(self.lm, self._probe, max_length=self._max_length)}, metadata
