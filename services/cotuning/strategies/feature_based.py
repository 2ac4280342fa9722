"""Feature-based co-tuning: devices and server draw their models' features of the probe rows towards each other's.

A family of the survey of on-device and cloud collaboration (arXiv 2504.15300); hints through a learned map as in
FitNets (arXiv 1412.6550), one shared target a row as in FedProto's prototypes (arXiv 2105.00243). What follows is ours.

With h_n the last hidden states of probe row n averaged over its response (`pooled_features.pool`), H a model's [N, D]
and c = mean_n h_n at the start of the round:

* The common space is the LLM's: `F = (G - c_L) P / r`, G its pooled states, P [D_L, E] drawn once from the run's seed
  and never learnt, r the root mean square of `(G - c_L) P`. Two maps that learn towards one another would shrink to
  nothing; one that stands still cannot.
* A device of any hidden size learns its way there: `W_i = argmin |(H_i - c_i) W - F|^2 + ridge s |W|^2`, in closed form
  at the start of each round (`pooled_features.fit_map`), and constant in it.
* A device's objective is `CE(private rows) + w * mean_n d((h_n - c_i) W_i, F_n)`, the mean over a batch of probe rows;
  d is `1 - cos` or `|a - b|^2 / mean_m |F_m|^2`. It sends `Z_i = (H_i - c_i) W_i` after training, float16 [N, E].
* The server takes `A = sum_i w_i Z_i`, w_i a device's share of all examples, and trains omega by
  `CE(public rows) + w * mean_n d((g_n - c_L) P / r, A_n)`. It sends F, taken anew, float16 [N, E].

Features are centred because pooled states of one model lie in a narrow cone, where every cosine is close to one. A map
of as many dimensions as there are probe rows explains any target: then the ridge alone leaves something to learn.
Features of public rows travel, nothing else; they do tell how a model that has read private rows sees public ones.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from cotuning.adapters import adapter_state
from cotuning.encoded_rows import EncodedRows
from cotuning.hidden_distillation import fresh_projections
from cotuning.language_model import LanguageModel
from cotuning.pooled_features import (
    DeviceFeatures,
    View,
    check_features,
    feature_steps,
    fit_map,
    mean_features,
    pooled_rows,
)
from cotuning.seeding import derive_seed
from cotuning.strategies.interface import DeviceInputs, DeviceMessage, ServerInputs, StrategySteps
from cotuning.strategies.results import DeviceResult, Message, ServerResult, only_tensor
from cotuning.strategies.tuning import DROPOUT, adapter_training, local_steps, public_steps, with_adapter
from cotuning.training import Precision, Step, draw_batches, row_sizes
from cotuning.tuning import StepAt, train_adapter
from protocol.strategies import FeatureBasedSettings

DEVICE_STAGE = "tuning_with_features"
SERVER_STAGE = "server_tuning_with_features"


class FeatureBased(StrategySteps[FeatureBasedSettings]):
    """Features of the probe rows, both ways: messages of one tensor, `features`, float16 [N, E]."""

    def first_message(self, given: ServerInputs) -> Message | None:
        """F of the LLM as it stands: what the devices' first round starts from."""
        assert given.llm is not None
        with with_adapter(given.llm, "llm", given.llm_adapter, self.settings.llm_lora, seed=given.seed) as lent:
            rows = EncodedRows(lent, given.probe, max_length=self.settings.server.max_length)
            return self._llm_features(lent, rows, given.seed)

    def device_step(self, given: DeviceInputs) -> DeviceResult:
        """One device's round: psi_i learns the private rows, and its features of Q those of the server.

        With a weight of 0 psi_i is that of the standalone baseline, bit for bit.

        Raises:
            FeaturesRefused: F is not what the settings say.
            AdapterMismatch: the adapter is not of this model and these settings.
        """
        assert given.message is not None
        settings, training = self.settings, self.settings.training
        target_NE = self._checked(given.message.tensors, len(given.probe))
        options = adapter_training(training, given, stage=DEVICE_STAGE, drawn_for=DROPOUT)
        with with_adapter(given.slm, "slm", given.slm_adapter, settings.slm_lora, seed=given.seed) as lent:
            rows = EncodedRows(lent, given.probe, max_length=settings.server.max_length)
            before_ND = pooled_rows(lent, rows)
            centre_D = before_ND.mean(0)
            view = View(centre_D, fit_map(before_ND - centre_D, target_NE, ridge=settings.ridge))
            step_at = _with_features(
                local_steps(lent, given, training),
                _Student(lent, "slm", rows, view, training.precision, training.micro_batch_size),
                target_NE,
                settings,
                steps=training.steps,
                seed=derive_seed(given.seed, "probe_rows", given.round_number),
            )
            losses = train_adapter(lent, "slm", step_at, steps=training.steps, **options)
            features = view.to_send(pooled_rows(lent, rows))
            return DeviceResult(
                slm_adapter=adapter_state(lent, "slm"),
                num_examples=len(given.private),
                losses=_named(losses, "slm"),
                message=Message({"features": features}),
            )

    def check_message(self, sent: DeviceMessage, given: ServerInputs) -> None:
        """See that the features are what the settings say."""
        self._checked(sent.tensors, len(given.probe))

    def server_step(self, given: ServerInputs) -> ServerResult:
        """The server's round: omega learns public rows, and the LLM's features of Q those of the devices.

        Their order changes rounding only; without any it is cross-entropy alone.

        Raises:
            FeaturesRefused: a device's features are not what the settings say.
            ValueError: a device without examples.
            AdapterMismatch: the adapter is not of this model and these settings.
        """
        assert given.llm is not None
        server = self.settings.server
        received = [
            DeviceFeatures(self._checked(each.tensors, len(given.probe)), each.num_examples)
            for each in given.device_messages
        ]
        options = adapter_training(server, given, stage=SERVER_STAGE)
        with with_adapter(given.llm, "llm", given.llm_adapter, self.settings.llm_lora, seed=given.seed) as lent:
            rows = EncodedRows(lent, given.probe, max_length=server.max_length)
            losses: dict[str, float] = {}
            if server.steps:
                step_at = self._server_objective(lent, rows, received, given)
                losses = train_adapter(lent, "llm", step_at, steps=server.steps, **options)
            return ServerResult(
                shared_adapter=None,
                message=self._llm_features(lent, rows, given.seed),
                llm_adapter=adapter_state(lent, "llm"),
                losses=_named(losses, "llm"),
            )

    def _server_objective(
        self, llm: LanguageModel, rows: EncodedRows, received: Sequence[DeviceFeatures], given: ServerInputs
    ) -> StepAt:
        settings, server = self.settings, self.settings.server
        step_at = public_steps(llm, given, server)
        if not received:
            return step_at
        view = _llm_view(pooled_rows(llm, rows), settings, given.seed)
        return _with_features(
            step_at,
            _Student(llm, "llm", rows, view, server.precision, server.micro_batch_size),
            mean_features(received, max_examples=settings.max_examples),
            settings,
            steps=server.steps,
            seed=derive_seed(given.seed, "server_probe_rows", given.round_number),
        )

    def _llm_features(self, llm: LanguageModel, rows: EncodedRows, seed: int) -> Message:
        """F of the LLM with the adapter that is on."""
        pooled_ND = pooled_rows(llm, rows)
        return Message({"features": _llm_view(pooled_ND, self.settings, seed).to_send(pooled_ND)})

    def _checked(self, tensors: Mapping[str, Tensor], num_rows: int) -> Tensor:
        """The features of a message, from a device or from the server."""
        features = only_tensor(tensors, "features")
        return check_features(features, num_rows=num_rows, feature_size=self.settings.feature_size)


@dataclass(frozen=True)
class _Student:
    """A model with its rows and its view."""

    lm: LanguageModel
    adapter: str
    rows: EncodedRows
    view: View
    precision: Precision
    micro_batch_size: int | None


def _llm_view(pooled_ND: Tensor, settings: FeatureBasedSettings, seed: int) -> View:
    """`(g - c) P / r`."""
    centre_D = pooled_ND.float().mean(0)
    size = pooled_ND.shape[1], settings.feature_size
    (drawn_DE,) = fresh_projections([size], seed=derive_seed(seed, "common_space"), device=torch.device("cpu"))
    map_DE = drawn_DE.detach()
    root = ((pooled_ND.float() - centre_D) @ map_DE).square().mean().sqrt()
    return View(centre_D, map_DE / root.clamp(min=torch.finfo(torch.float32).tiny))


def _with_features(
    step_at: StepAt,
    student: _Student,
    target_NE: Tensor,
    settings: FeatureBasedSettings,
    *,
    steps: int,
    seed: int,
) -> StepAt:
    """The objective with the distance of features added, from batches of probe rows of its own."""
    if not settings.feature_weight:
        return step_at
    probe = student.rows.examples
    drawn = draw_batches(
        row_sizes(probe), batch_size=min(settings.probe_batch_size, len(probe)), steps=steps, seed=seed
    )
    features_at = feature_steps(
        student.lm,
        student.adapter,
        student.rows,
        drawn,
        view=student.view,
        target_NE=target_NE,
        distance=settings.distance,
        weight=settings.feature_weight,
        precision=student.precision,
        micro_batch_size=student.micro_batch_size,
    )

    def both(step: int) -> Iterator[Step]:
        return chain(step_at(step), features_at(step))

    return both


def _named(losses: Mapping[str, float], adapter: str) -> dict[str, float]:
    names = {"cross_entropy": "ce"}
    return {f"{adapter}_{names.get(name, name)}": value for name, value in losses.items()}
