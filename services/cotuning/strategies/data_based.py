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

from collections.abc import Sequence

import torch
from torch import Tensor

from cotuning.adapters import adapter_state
from cotuning.candidates import (
    Candidate,
    Tallies,
    check_counts,
    count_groups,
    group_seeds,
    seed_weights,
    write_candidates,
)
from cotuning.probe_logits import row_losses
from cotuning.seeding import derive_seed
from cotuning.strategies.interface import DeviceInputs, DeviceMessage, ServerInputs, StrategySteps
from cotuning.strategies.results import DeviceResult, Message, ServerResult, only_tensor
from cotuning.strategies.tuning import adapter_training, public_steps, tune_locally, with_adapter
from cotuning.tuning import train_adapter
from protocol.strategies import DataBasedSettings

DEVICE_STAGE = "tuning_with_candidates"
SERVER_STAGE = "public_tuning"


class DataBased(StrategySteps[DataBasedSettings]):
    """Candidates to the devices, counts back."""

    def device_step(self, given: DeviceInputs) -> DeviceResult:
        """One device's round: candidates are scored and chosen, psi_i learns private rows and those.

        Where nothing is kept this is the standalone baseline, bit for bit. The counts leave as a message, int64 [G],
        where there were candidates.

        Raises:
            ValueError: no private rows, a candidate of a group out of range, or more groups than can be answered for.
            AdapterMismatch: the adapter is not of this model and these settings.
        """
        settings, training = self.settings, self.settings.training
        candidates, num_groups = candidates_of(given.message)
        most_bytes = settings.most_message_bytes(0)
        if num_groups * torch.int64.itemsize > most_bytes:  # before anything of that size is made
            raise ValueError(f"expected groups whose counts take at most {most_bytes} bytes, got {num_groups} groups")
        count_groups(candidates, num_groups)
        with with_adapter(given.slm, "slm", given.slm_adapter, settings.slm_lora, seed=given.seed) as lent:
            losses_N = row_losses(lent, [each.example for each in candidates], max_length=training.max_length)
            private_M = torch.zeros(0)
            if candidates and settings.keep == "below_private":
                private_M = row_losses(lent, given.private, max_length=training.max_length)
            kept_N = choose_candidates(losses_N, private_M, settings)
            kept = [candidate for candidate, keep in zip(candidates, kept_N.tolist(), strict=True) if keep]
            losses = tune_locally(
                lent,
                given,
                training,
                stage=DEVICE_STAGE,
                added=[each.example for each in kept],
                added_share=settings.candidate_fraction,
            )
            return DeviceResult(
                slm_adapter=adapter_state(lent, "slm"),
                num_examples=len(given.private),
                losses=losses,
                message=Message({"kept": count_groups(kept, num_groups)}) if candidates else None,
            )

    def check_message(self, sent: DeviceMessage, given: ServerInputs) -> None:
        """See that the counts are some that a device with these candidates can have."""
        groups = group_seeds(given.public, self.settings.count_by)
        offered, _ = candidates_of(given.message)
        check_counts(only_tensor(sent.tensors, "kept"), count_groups(offered, max(groups) + 1))

    def server_step(self, given: ServerInputs) -> ServerResult:
        """The server's round: what was kept is counted, omega learns public rows, and the LLM writes candidates.

        The candidates leave as a message, for the devices' next round; the tallies of all rounds are the server's
        state. The public rows are the seeds, and must come in the same order in every round; devices need not.

        Raises:
            ValueError: no public rows, or counts that no device can have.
            AdapterMismatch: the adapter is not of this model and these settings.
        """
        assert given.llm is not None
        if not given.public:
            raise ValueError("expected at least one public row to write from, got none")
        settings, server = self.settings, self.settings.server
        groups = group_seeds(given.public, settings.count_by)
        tallies = _counted(given, max(groups) + 1)
        options = adapter_training(server, given, stage=SERVER_STAGE)
        with with_adapter(given.llm, "llm", given.llm_adapter, settings.llm_lora, seed=given.seed) as lent:
            losses = train_adapter(lent, "llm", public_steps(lent, given, server), steps=server.steps, **options)
            fresh = write_candidates(
                lent,
                given.public,
                groups,
                seed_weights(tallies, groups, settings.smoothing),
                count=settings.candidates,
                shots=settings.shots,
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.sampling_temperature,
                max_length=server.max_length,
                seed=derive_seed(given.seed, "candidates", given.round_number),
            )
            return ServerResult(
                shared_adapter=None,
                llm_adapter=adapter_state(lent, "llm"),
                losses={"llm_ce": losses["cross_entropy"]} if losses else {},
                message=candidates_message(fresh, len(tallies.kept_G)),
                state={"offered": tallies.offered_G, "kept": tallies.kept_G},
            )


def candidates_message(candidates: Sequence[Candidate], num_groups: int) -> Message:
    """What the devices are sent: candidates, the group of each, and G."""
    groups = torch.tensor([each.group for each in candidates], dtype=torch.int64)
    return Message({"group": groups}, {"num_groups": str(num_groups)}, [each.example for each in candidates])


def candidates_of(message: Message | None) -> tuple[list[Candidate], int]:
    """The candidates of a message, and G; none where there is no message."""
    if message is None:
        return [], 0
    groups = message.tensors["group"].tolist()
    candidates = [Candidate(row, group) for row, group in zip(message.rows, groups, strict=True)]
    return candidates, int(message.metadata["num_groups"])


def _counted(given: ServerInputs, num_groups: int) -> Tallies:
    """The tallies of all rounds, this one's counts added."""
    offered, _ = candidates_of(given.message)
    written_G = count_groups(offered, num_groups)
    counts = [check_counts(only_tensor(each.tensors, "kept"), written_G) for each in given.device_messages]
    before = Tallies(given.state["offered"], given.state["kept"]) if given.state else Tallies.empty(num_groups)
    return before.add(written_G, counts)


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
