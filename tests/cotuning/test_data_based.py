import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from cotuning.adapters import AdapterState
from cotuning.candidates import Candidate
from cotuning.examples import Example
from cotuning.probe_logits import row_losses
from cotuning.strategies.data_based import DataBased, candidates_message, candidates_of, choose_candidates
from cotuning.strategies.results import DeviceResult, Message, ServerResult, only_tensor
from protocol.strategies import DataBasedSettings, LocalTraining, ServerSteps
from tests.cotuning.strategy_inputs import (
    LORA,
    SEED,
    device_inputs,
    only_a_message,
    same,
    sent,
    server_inputs,
    tuned_alone,
)
from tests.tiny_models import tiny_examples, tiny_language_model

PRIVATE = tiny_examples(12)
PUBLIC = [replace(row, task=task) for row, task in zip(tiny_examples(6, start=100), "aabbbc", strict=True)]
OFFERED = [
    Candidate(row, group)
    for group, row in enumerate([*tiny_examples(3, start=200), *tiny_examples(3, start=20, kind="sum")])
]
TRAINING = LocalTraining(steps=4, batch_size=4, learning_rate=1e-2, max_length=64)


def settings(**changes: Any) -> DataBasedSettings:
    values: dict[str, Any] = {
        "slm_lora": LORA,
        "llm_lora": LORA,
        "training": TRAINING,
        "candidates": 6,
        "max_new_tokens": 16,
        "server": ServerSteps(steps=3, batch_size=4, max_length=128),
    }
    return DataBasedSettings(**values | changes)


def device(
    chosen: DataBasedSettings | None = None,
    *,
    candidates: Sequence[Candidate] = OFFERED,
    num_groups: int = 6,
    private: Sequence[Example] = PRIVATE,
    seed: int = SEED,
) -> DeviceResult:
    message = candidates_message(candidates, num_groups)
    given = device_inputs(tiny_language_model("gpt2"), private, message=message, seed=seed)
    return DataBased(chosen or settings()).device_step(given)


def server(
    chosen: DataBasedSettings | None = None,
    *,
    candidates: Sequence[Candidate] = (),
    num_groups: int = 6,
    device_counts: Sequence[Tensor] = (),
    **changes: Any,
) -> ServerResult:
    slm = tiny_language_model("gpt2")
    values: dict[str, Any] = {
        "llm": tiny_language_model("llama"),
        "public": PUBLIC,
        "message": candidates_message(candidates, num_groups),
        "device_messages": [sent(Message({"kept": each}), slm, num_examples=12) for each in device_counts],
    }
    return DataBased(chosen or settings()).server_step(server_inputs(**values | changes))


def counts(result: DeviceResult) -> Tensor:
    return only_tensor(only_a_message(result).tensors, "kept")


def omega(result: ServerResult) -> AdapterState:
    assert result.llm_adapter is not None
    return result.llm_adapter


def alone() -> AdapterState:
    return tuned_alone(device_inputs(tiny_language_model("gpt2"), PRIVATE), TRAINING)


def kept(losses: list[float], private: list[float] = [], **rule: Any) -> list[int]:  # noqa: B006 - never changed
    chosen = choose_candidates(torch.tensor(losses), torch.tensor(private), settings(**rule))
    return chosen.nonzero().flatten().tolist()


def test_the_quantile_rule_by_hand() -> None:
    losses = [5.0, 1.0, math.nan, 3.0, 2.0, math.inf, 4.0]
    # Of 1, 2, 3, 4, 5: the quarter is 2, the middle 3; 0.3 lies at 2.2.
    assert kept(losses, low_quantile=0.25, high_quantile=0.5) == [3, 4]
    assert kept(losses, low_quantile=0.3, high_quantile=0.5) == [3]
    assert kept(losses, low_quantile=0.0, high_quantile=1.0) == [0, 1, 3, 4, 6]
    assert kept([2.0, 2.0], low_quantile=0.5, high_quantile=0.5) == [0, 1]  # a tie is kept
    assert kept([math.nan, math.inf], low_quantile=0.0, high_quantile=1.0) == []
    assert kept([]) == []


def test_the_private_rule_by_hand() -> None:
    losses = [0.9, 2.5, 2.6, math.nan, -math.inf, 3.1]
    private = [1.0, 4.0, math.nan, 3.0, 2.0]  # the median of four is 2.5
    assert kept(losses, private, keep="below_private") == [0, 1]
    assert kept(losses, private, keep="below_private", margin=0.5) == [0, 1, 2]
    assert kept(losses, private, keep="below_private", margin=-1.6) == [0]
    assert kept(losses, [math.nan], keep="below_private") == []


def test_what_a_device_keeps_is_what_the_rule_says_of_its_own_losses() -> None:
    slm = tiny_language_model("gpt2")
    chosen = settings(low_quantile=0.3, high_quantile=0.8)
    losses_N = row_losses(slm, [each.example for each in OFFERED], max_length=64)
    expected = choose_candidates(losses_N, torch.zeros(0), chosen)
    kept_G = counts(device(chosen))
    assert kept_G.tolist() == expected.long().tolist()
    assert 0 < int(kept_G.sum()) < 6
    private_M = row_losses(slm, PRIVATE, max_length=64)
    below = settings(keep="below_private", margin=0.02)
    assert counts(device(below)).tolist() == choose_candidates(losses_N, private_M, below).long().tolist()


def test_what_is_sent_are_counts_only() -> None:
    """One whole number a group, which says how many of its candidates were kept and nothing else."""
    result = device()
    kept_G = counts(result)  # nothing else leaves with it
    assert result.message is not None
    assert result.message.metadata == {}
    assert kept_G.dtype == torch.int64
    assert kept_G.shape == (6,)
    assert ((kept_G >= 0) & (kept_G <= 1)).all()
    # Rows that are kept alike give the same message, whatever the private rows are.
    other = device(private=tiny_examples(12, start=50))
    assert torch.equal(counts(other), kept_G)
    assert not same(other.slm_adapter, result.slm_adapter)
    by_task = device(candidates=[replace(each, group=each.group // 3) for each in OFFERED], num_groups=2)
    assert counts(by_task).tolist() == [int(kept_G[:3].sum()), int(kept_G[3:].sum())]
    assert set(result.losses) == {"slm_ce"}
    assert result.num_examples == 12


@pytest.mark.parametrize("reason", ["no_candidates", "none_kept", "no_share"])
def test_where_nothing_is_added_it_is_the_standalone_baseline_bit_for_bit(reason: str) -> None:
    changes: dict[str, dict[str, Any]] = {
        "no_candidates": {"candidates": []},
        "none_kept": {"chosen": settings(keep="below_private", margin=-100.0)},
        "no_share": {"chosen": settings(candidate_fraction=0.0)},
    }
    result = device(**changes[reason])
    assert same(result.slm_adapter, alone())
    assert (result.message is None) == (reason == "no_candidates")
    assert not same(device().slm_adapter, alone())


def test_only_what_is_kept_is_trained_on() -> None:
    chosen = settings(low_quantile=0.0, high_quantile=0.5)
    result = device(chosen)
    left = [each for each, count in zip(OFFERED, counts(result).tolist(), strict=True) if count]
    assert len(left) == 3
    everything = settings(low_quantile=0.0, high_quantile=1.0)
    assert same(device(everything, candidates=left).slm_adapter, result.slm_adapter)


def test_equal_arguments_give_equal_bits() -> None:
    first, again, other = device(), device(), device(seed=10)
    assert same(first.slm_adapter, again.slm_adapter)
    assert first.losses == again.losses
    assert not same(first.slm_adapter, other.slm_adapter)
    served, repeated = server(), server()
    assert same(omega(served), omega(repeated))
    assert candidates_of(served.message) == candidates_of(repeated.message)


def test_the_server_counts_what_devices_kept_whatever_their_order() -> None:
    kept = [torch.tensor([1, 0, 1, 0, 0, 0]), torch.tensor([1, 1, 0, 0, 0, 0])]
    first = server(candidates=OFFERED, device_counts=kept)
    assert first.state["offered"].tolist() == [2] * 6
    assert first.state["kept"].tolist() == [2, 1, 1, 0, 0, 0]
    turned = server(candidates=OFFERED, device_counts=kept[::-1])
    assert candidates_of(turned.message) == candidates_of(first.message)
    assert same(omega(turned), omega(first))
    later = server(candidates=OFFERED, device_counts=kept, state=first.state, llm_adapter=first.llm_adapter)
    assert later.state["kept"].tolist() == [4, 2, 2, 0, 0, 0]


def test_counts_by_task() -> None:
    by_task = settings(count_by="task")
    rows = [replace(each, group=each.group % 3) for each in OFFERED]
    served = server(by_task, candidates=rows, num_groups=3, device_counts=[torch.tensor([2, 0, 1])])
    assert served.state["offered"].tolist() == [2, 2, 2]
    assert served.state["kept"].tolist() == [2, 0, 1]


def test_the_llm_learns_public_rows_before_it_writes() -> None:
    stages: list[str] = []
    served = server(on_progress=lambda stage, *_: stages.append(stage))
    assert stages == ["public_tuning"] * 3
    assert set(served.losses) == {"llm_ce"}
    still = server(settings(server=ServerSteps(steps=0, max_length=128)))
    assert still.losses == {}
    assert not any(tensor.any() for name, tensor in omega(still).items() if "lora_B" in name)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one public row to write from, got none"):
        server(public=[])
    with pytest.raises(ValueError, match=r"a count in 0\.\.1 for group 2, got 5"):
        server(candidates=OFFERED, device_counts=[torch.tensor([0, 0, 5, 0, 0, 0])])
    with pytest.raises(ValueError, match=r"groups in 0\.\.4, got 5"):
        device(num_groups=5)
    with pytest.raises(ValueError, match="at least one row to train on, got none"):
        device(private=[])
    with pytest.raises(ValidationError, match=r"`low_quantile` at most `high_quantile`, got 0\.7 and 0\.2"):
        settings(low_quantile=0.7, high_quantile=0.2)


def test_more_groups_than_can_be_answered_for_are_refused_before_they_are_counted() -> None:
    with pytest.raises(ValueError, match=r"take at most [0-9]+ bytes, got 1000000000000 groups"):
        device(num_groups=10**12)
