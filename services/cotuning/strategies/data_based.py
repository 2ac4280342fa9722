"""Data-based co-tuning: the LLM writes candidate examples, each device keeps what fits, and says only how many.

A family of the survey of on-device and cloud collaboration (arXiv 2504.15300); this member of it is ours. At the end
of a round the server trains omega on public rows and lets the LLM write candidates from public seeds (`candidates`).
In the next round each device scores them by its own SLM's loss, keeps those that a rule lets in, and trains psi_i on
its private rows and on them. It sends one number a seed, or a task: how many of its candidates it kept. From these the
server decides which seeds the LLM writes from next. No text leaves a device, and no loss.

The rule, by the mean cross-entropy per response token of the SLM before it trains in that round:

* `quantiles`: between two quantiles of the candidates' own losses: neither known already nor foreign;
* `below_private`: at most the median loss of the private rows plus a margin.

A loss that is not finite is never kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cotuning.adapters import AdapterState, adapter_state
from cotuning.candidates import (
    Candidate,
    Tallies,
    check_counts,
    count_groups,
    group_seeds,
    seed_weights,
    write_candidates,
)
from cotuning.checkpoints import Checkpoints
from cotuning.examples import Example
from cotuning.language_model import LanguageModel
from cotuning.probe_logits import row_losses
from cotuning.seeding import derive_seed
from cotuning.strategies.interface import DeviceInputs, ServerInputs, StrategySteps
from cotuning.strategies.results import DeviceResult, Message, ServerResult, only_tensor
from cotuning.strategies.tuning import public_steps, server_training, tune_locally, with_adapter
from cotuning.training import OnProgress
from cotuning.tuning import train_adapter
from protocol.strategies import DataBasedSettings

DEVICE_STAGE = "tuning_with_candidates"
SERVER_STAGE = "public_tuning"


@dataclass(frozen=True)
class DataDeviceResult:
    """One device's share of a round. Only `kept` and numbers of `losses` may leave the device.

    Attributes:
        slm_adapter: psi_i, for the next round; never leaves.
        kept: int64 [G], how many candidates of each group were kept; empty tensor where there were no candidates.
        num_examples: private rows trained on.
        losses: mean of the last tenth of the steps, nats.
    """

    slm_adapter: AdapterState
    kept: Tensor
    num_examples: int
    losses: dict[str, float]


@dataclass(frozen=True)
class DataServerResult:
    """The server's share of a round.

    Attributes:
        llm_adapter: omega.
        candidates: for all devices, in the next round.
        tallies: of all rounds so far.
        losses: mean of the last tenth of the steps, nats; empty for no steps.
    """

    llm_adapter: AdapterState
    candidates: list[Candidate]
    tallies: Tallies
    losses: dict[str, float] = field(default_factory=dict)


def device_step(
    *,
    slm: LanguageModel,
    private: Sequence[Example],
    candidates: Sequence[Candidate],
    num_groups: int,
    slm_adapter: Mapping[str, Tensor] | None,
    settings: DataBasedSettings,
    round_number: int,
    seed: int,
    on_progress: OnProgress,
    checkpoints: Checkpoints | None = None,
) -> DataDeviceResult:
    """One device's round: candidates are scored and chosen, psi_i learns private rows and those.

    Where nothing is kept this is the standalone baseline, bit for bit.

    Args:
        slm: without adapters; given back so.
        private: D_i.
        candidates: what the server wrote at the end of the last round; none in the first.
        num_groups: G.
        slm_adapter: psi_i after the last round, None in the first.
        settings: of the strategy.
        round_number: from 1.
        seed: the run's; equal arguments give equal bits.
        on_progress: see `training.OnProgress`.
        checkpoints: see `training.train`.

    Raises:
        ValueError: no private rows, or a candidate of a group out of range.
        AdapterMismatch: the adapter is not of this model and these settings.
    """
    training = settings.training
    count_groups(candidates, num_groups)
    with with_adapter(slm, "slm", slm_adapter, settings.slm_lora, seed=seed) as lent:
        losses_N = row_losses(lent, [each.example for each in candidates], max_length=training.max_length)
        private_M = torch.zeros(0)
        if candidates and settings.keep == "below_private":
            private_M = row_losses(lent, private, max_length=training.max_length)
        kept_N = choose_candidates(losses_N, private_M, settings)
        kept = [candidate for candidate, keep in zip(candidates, kept_N.tolist(), strict=True) if keep]
        losses = tune_locally(
            lent,
            private,
            training,
            added=[each.example for each in kept],
            added_share=settings.candidate_fraction,
            round_number=round_number,
            seed=seed,
            stage=DEVICE_STAGE,
            on_progress=on_progress,
            checkpoints=checkpoints,
        )
        return DataDeviceResult(adapter_state(lent, "slm"), count_groups(kept, num_groups), len(private), losses)


def server_step(
    *,
    llm: LanguageModel,
    public: Sequence[Example],
    llm_adapter: Mapping[str, Tensor] | None,
    candidates: Sequence[Candidate],
    device_counts: Sequence[Tensor],
    tallies: Tallies | None,
    settings: DataBasedSettings,
    round_number: int,
    seed: int,
    on_progress: OnProgress,
    checkpoints: Checkpoints | None = None,
) -> DataServerResult:
    """The server's round: what was kept is counted, omega learns public rows, and the LLM writes the next candidates.

    Args:
        llm: without adapters; given back so.
        public: the seeds, in the same order in every round.
        llm_adapter: omega after the last round, None in the first.
        candidates: that the devices were given in this round.
        device_counts: what each device says it kept of them; the order does not matter.
        tallies: of the rounds before, None in the first.
        settings: of the strategy.
        round_number: from 1; 0 to have candidates for the first round.
        seed: the run's.
        on_progress: see `training.OnProgress`.
        checkpoints: see `training.train`.

    Raises:
        ValueError: no public rows, or counts that no device can have.
        AdapterMismatch: the adapter is not of this model and these settings.
    """
    if not public:
        raise ValueError("expected at least one public row to write from, got none")
    server = settings.server
    groups = group_seeds(public, settings.count_by)
    num_groups = max(groups) + 1
    written_G = count_groups(candidates, num_groups)
    counts = [check_counts(kept_G, written_G) for kept_G in device_counts]
    tallies = (tallies or Tallies.empty(num_groups)).add(written_G, counts)
    options = server_training(
        server,
        seed=derive_seed(seed, SERVER_STAGE, round_number),
        stage=SERVER_STAGE,
        on_progress=on_progress,
        checkpoints=checkpoints,
    )
    with with_adapter(llm, "llm", llm_adapter, settings.llm_lora, seed=seed) as lent:
        step_at = public_steps(lent, public, server, round_number=round_number, seed=seed)
        losses = train_adapter(lent, "llm", step_at, steps=server.steps, **options)
        fresh = write_candidates(
            lent,
            public,
            groups,
            seed_weights(tallies, groups, settings.smoothing),
            count=settings.candidates,
            shots=settings.shots,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.sampling_temperature,
            max_length=server.max_length,
            seed=derive_seed(seed, "candidates", round_number),
        )
        reported = {"llm_ce": losses["cross_entropy"]} if losses else {}
        return DataServerResult(adapter_state(lent, "llm"), fresh, tallies, reported)


def choose_candidates(losses_N: Tensor, private_losses_M: Tensor, settings: DataBasedSettings) -> Tensor:
    """Which candidates a device keeps: bool [N].

    Args:
        losses_N: of the candidates, nats a token.
        private_losses_M: of the private rows, for `below_private`.
        settings: the rule; quantiles and the median are interpolated between two losses.
    """
    finite_N: Tensor = losses_N.isfinite()
    if settings.keep == "quantiles":
        if not finite_N.any():
            return finite_N
        bounds = torch.tensor([settings.low_quantile, settings.high_quantile], dtype=torch.float64)
        low, high = losses_N[finite_N].double().quantile(bounds)
        return finite_N.logical_and((losses_N.double() >= low) & (losses_N.double() <= high))
    known_M = private_losses_M[private_losses_M.isfinite()].double()
    if not len(known_M):
        return torch.zeros_like(finite_N)
    most = known_M.quantile(0.5) + settings.margin
    return finite_N.logical_and(losses_N.double() <= most)


class DataBased(StrategySteps[DataBasedSettings]):
    """Candidates to the devices, counts back."""

    def device_step(self, given: DeviceInputs) -> DeviceResult:
        """As the function of this name; the counts leave as a message, where there were candidates."""
        candidates, num_groups = _candidates_in(given.message)
        result = device_step(
            slm=given.slm,
            private=given.private,
            candidates=candidates,
            num_groups=num_groups,
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
            message=Message({"kept": result.kept}) if candidates else None,
        )

    def server_step(self, given: ServerInputs) -> ServerResult:
        """As the function of this name; the candidates leave as a message, the tallies are the server's state."""
        assert given.llm is not None
        candidates, _ = _candidates_in(given.message)
        served = server_step(
            llm=given.llm,
            public=given.public,
            llm_adapter=given.llm_adapter,
            candidates=candidates,
            device_counts=[only_tensor(each.tensors, "kept") for each in given.device_messages],
            tallies=Tallies(given.state["offered"], given.state["kept"]) if given.state else None,
            settings=self.settings,
            round_number=given.round_number,
            seed=given.seed,
            on_progress=given.on_progress,
            checkpoints=given.checkpoints,
        )
        groups = torch.tensor([each.group for each in served.candidates], dtype=torch.int64)
        return ServerResult(
            shared_adapter=None,
            llm_adapter=served.llm_adapter,
            losses=served.losses,
            message=Message(
                {"group": groups},
                {"num_groups": str(len(served.tallies.kept_G))},
                [each.example for each in served.candidates],
            ),
            state={"offered": served.tallies.offered_G, "kept": served.tallies.kept_G},
        )


def _candidates_in(message: Message | None) -> tuple[list[Candidate], int]:
    """The candidates of a message, and G; none where there is no message."""
    if message is None:
        return [], 0
    groups = message.tensors["group"].tolist()
    candidates = [Candidate(row, group) for row, group in zip(message.rows, groups, strict=True)]
    return candidates, int(message.metadata["num_groups"])
