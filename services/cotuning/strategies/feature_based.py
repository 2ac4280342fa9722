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
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from cotuning.adapters import AdapterState, adapter_state
from cotuning.checkpoints import Checkpoints
from cotuning.encoded_rows import EncodedRows
from cotuning.examples import Example
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
from cotuning.strategies.interface import DeviceInputs, ServerInputs, StrategySteps
from cotuning.strategies.results import DeviceResult, Message, ServerResult, only_tensor
from cotuning.strategies.tuning import adapter_training, local_steps, public_steps, server_training, with_adapter
from cotuning.training import OnProgress, Precision, Step, draw_batches, row_sizes
from cotuning.tuning import StepAt, train_adapter
from protocol.strategies import FeatureBasedSettings

DEVICE_STAGE = "tuning_with_features"
SERVER_STAGE = "server_tuning_with_features"


@dataclass(frozen=True)
class FeatureDeviceResult:
    """One device's share of a round. Only `features` and numbers may leave the device.

    Attributes:
        slm_adapter: psi_i, for the next round; never leaves.
        features: Z_i, float16 [N, E].
        num_examples: private rows trained on.
        losses: means of the last tenth of the steps: `slm_ce` in nats, `slm_feature` as a distance.
    """

    slm_adapter: AdapterState
    features: Tensor
    num_examples: int
    losses: dict[str, float]


@dataclass(frozen=True)
class FeatureServerResult:
    """The server's share of a round.

    Attributes:
        llm_adapter: omega.
        features: F, float16 [N, E], for all devices.
        losses: means of the last tenth of the steps; empty for no steps.
    """

    llm_adapter: AdapterState
    features: Tensor
    losses: dict[str, float] = field(default_factory=dict)


def device_step(
    *,
    slm: LanguageModel,
    private: Sequence[Example],
    probe: Sequence[Example],
    server_features: Tensor,
    slm_adapter: Mapping[str, Tensor] | None,
    settings: FeatureBasedSettings,
    round_number: int,
    seed: int,
    on_progress: OnProgress,
    checkpoints: Checkpoints | None = None,
) -> FeatureDeviceResult:
    """One device's round: psi_i learns the private rows, and its features of Q those of the server.

    With a weight of 0 psi_i is that of the standalone baseline, bit for bit.

    Args:
        slm: without adapters; given back so.
        private: D_i.
        probe: Q, public.
        server_features: F of the last round, of `initial_features` in the first.
        slm_adapter: psi_i after the last round, None in the first.
        settings: of the strategy.
        round_number: from 1.
        seed: the run's; equal arguments give equal bits.
        on_progress: see `training.OnProgress`.
        checkpoints: see `training.train`.

    Raises:
        FeaturesRefused: F is not what the settings say.
        AdapterMismatch: the adapter is not of this model and these settings.
    """
    training = settings.training
    target_NE = check_features(server_features, num_rows=len(probe), feature_size=settings.feature_size)
    options = adapter_training(
        training,
        seed=derive_seed(seed, "dropout", round_number),
        stage=DEVICE_STAGE,
        on_progress=on_progress,
        checkpoints=checkpoints,
    )
    with with_adapter(slm, "slm", slm_adapter, settings.slm_lora, seed=seed) as lent:
        rows = EncodedRows(lent, probe, max_length=settings.server.max_length)
        before_ND = pooled_rows(lent, rows)
        centre_D = before_ND.mean(0)
        view = View(centre_D, fit_map(before_ND - centre_D, target_NE, ridge=settings.ridge))
        step_at = _with_features(
            local_steps(lent, private, training, round_number=round_number, seed=seed),
            _Student(lent, "slm", rows, view, training.precision, training.micro_batch_size),
            target_NE,
            settings,
            steps=training.steps,
            seed=derive_seed(seed, "probe_rows", round_number),
        )
        losses = train_adapter(lent, "slm", step_at, steps=training.steps, **options)
        features = view.to_send(pooled_rows(lent, rows))
        return FeatureDeviceResult(adapter_state(lent, "slm"), features, len(private), _named(losses, "slm"))


def initial_features(
    *,
    llm: LanguageModel,
    probe: Sequence[Example],
    llm_adapter: Mapping[str, Tensor] | None,
    settings: FeatureBasedSettings,
    seed: int,
) -> Tensor:
    """F of the LLM as it stands: what the devices' first round starts from; float16 [N, E].

    Args: as for `server_step`.
    """
    with with_adapter(llm, "llm", llm_adapter, settings.llm_lora, seed=seed) as lent:
        rows = EncodedRows(lent, probe, max_length=settings.server.max_length)
        pooled_ND = pooled_rows(lent, rows)
        return _llm_view(pooled_ND, settings, seed).to_send(pooled_ND)


def server_step(
    *,
    llm: LanguageModel,
    public: Sequence[Example],
    probe: Sequence[Example],
    llm_adapter: Mapping[str, Tensor] | None,
    device_features: Sequence[DeviceFeatures],
    settings: FeatureBasedSettings,
    round_number: int,
    seed: int,
    on_progress: OnProgress,
    checkpoints: Checkpoints | None = None,
) -> FeatureServerResult:
    """The server's round: omega learns public rows, and the LLM's features of Q those of the devices.

    Args:
        llm: without adapters; given back so.
        public: D_pub without the probe rows.
        probe: Q.
        llm_adapter: omega after the last round, None in the first.
        device_features: one a device; their order changes rounding only. None: cross-entropy alone.
        settings: of the strategy.
        round_number: from 1.
        seed: the run's, the same in every round: it is of the common space.
        on_progress: see `training.OnProgress`.
        checkpoints: see `training.train`.

    Raises:
        ValueError: a device without examples.
        AdapterMismatch: the adapter is not of this model and these settings.
    """
    server = settings.server
    options = server_training(
        server,
        seed=derive_seed(seed, SERVER_STAGE, round_number),
        stage=SERVER_STAGE,
        on_progress=on_progress,
        checkpoints=checkpoints,
    )
    with with_adapter(llm, "llm", llm_adapter, settings.llm_lora, seed=seed) as lent:
        rows = EncodedRows(lent, probe, max_length=server.max_length)
        losses: dict[str, float] = {}
        if server.steps:
            step_at = public_steps(lent, public, server, round_number=round_number, seed=seed)
            if device_features:
                step_at = _with_features(
                    step_at,
                    _Student(
                        lent,
                        "llm",
                        rows,
                        _llm_view(pooled_rows(lent, rows), settings, seed),
                        server.precision,
                        server.micro_batch_size,
                    ),
                    mean_features(device_features, max_examples=settings.max_examples),
                    settings,
                    steps=server.steps,
                    seed=derive_seed(seed, "server_probe_rows", round_number),
                )
            losses = train_adapter(lent, "llm", step_at, steps=server.steps, **options)
        pooled_ND = pooled_rows(lent, rows)
        features = _llm_view(pooled_ND, settings, seed).to_send(pooled_ND)
        return FeatureServerResult(adapter_state(lent, "llm"), features, _named(losses, "llm"))


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


class FeatureBased(StrategySteps[FeatureBasedSettings]):
    """Features of the probe rows, both ways."""

    def first_message(self, given: ServerInputs) -> Message | None:
        """As `initial_features`."""
        assert given.llm is not None
        features = initial_features(
            llm=given.llm,
            probe=given.probe,
            llm_adapter=given.llm_adapter,
            settings=self.settings,
            seed=given.seed,
        )
        return Message({"features": features})

    def device_step(self, given: DeviceInputs) -> DeviceResult:
        """As the function of this name; the features leave as a message."""
        assert given.message is not None
        result = device_step(
            slm=given.slm,
            private=given.private,
            probe=given.probe,
            server_features=only_tensor(given.message.tensors, "features"),
            slm_adapter=given.slm_adapter,
            settings=self.settings,
            round_number=given.round_number,
            seed=given.seed,
            on_progress=given.on_progress,
            checkpoints=given.checkpoints,
        )
        return DeviceResult(
            slm_adapter=result.slm_adapter,
            num_examples=result.num_examples,
            losses=result.losses,
            message=Message({"features": result.features}),
        )

    def server_step(self, given: ServerInputs) -> ServerResult:
        """As the function of this name; the LLM's features leave as a message."""
        assert given.llm is not None
        shape = {"num_rows": len(given.probe), "feature_size": self.settings.feature_size}
        received = [
            DeviceFeatures(check_features(only_tensor(each.tensors, "features"), **shape), each.num_examples)
            for each in given.device_messages
        ]
        served = server_step(
            llm=given.llm,
            public=given.public,
            probe=given.probe,
            llm_adapter=given.llm_adapter,
            device_features=received,
            settings=self.settings,
            round_number=given.round_number,
            seed=given.seed,
            on_progress=given.on_progress,
            checkpoints=given.checkpoints,
        )
        return ServerResult(
            shared_adapter=None,
            llm_adapter=served.llm_adapter,
            losses=served.losses,
            message=Message({"features": served.features}),
        )
