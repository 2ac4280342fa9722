import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from cotuning.adapters import AdapterState
from cotuning.candidates import Candidate, Tallies
from cotuning.probe_logits import row_losses
from cotuning.strategies import data_based, standalone
from cotuning.strategies.data_based import choose_candidates
from protocol.strategies import DataBasedSettings, LocalTraining, LoraSettings, ServerSteps, StandaloneSettings
from tests.tiny_models import tiny_examples, tiny_language_model

PRIVATE = tiny_examples(12)
PUBLIC = [replace(row, task=task) for row, task in zip(tiny_examples(6, start=100), "aabbbc", strict=True)]
OFFERED = [
    Candidate(row, group)
    for group, row in enumerate([*tiny_examples(3, start=200), *tiny_examples(3, start=20, kind="sum")])
]
LORA = LoraSettings(rank=2, alpha=4.0)
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


def silent(stage: str, step: int, steps: int, losses: dict[str, float]) -> None:
    pass


def device(**changes: Any) -> data_based.DataDeviceResult:
    values: dict[str, Any] = {
        "slm": tiny_language_model("gpt2"),
        "private": PRIVATE,
        "candidates": OFFERED,
        "num_groups": 6,
        "slm_adapter": None,
        "settings": settings(),
        "round_number": 1,
        "seed": 9,
        "on_progress": silent,
    }
    return data_based.device_step(**values | changes)


def server(**changes: Any) -> data_based.DataServerResult:
    values: dict[str, Any] = {
        "llm": tiny_language_model("llama"),
        "public": PUBLIC,
        "llm_adapter": None,
        "candidates": [],
        "device_counts": [],
        "tallies": None,
        "settings": settings(),
        "round_number": 1,
        "seed": 9,
        "on_progress": silent,
    }
    return data_based.server_step(**values | changes)


def same(a: AdapterState, b: AdapterState) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def alone() -> AdapterState:
    return standalone.device_step(
        slm=tiny_language_model("gpt2"),
        private=PRIVATE,
        slm_adapter=None,
        settings=StandaloneSettings(slm_lora=LORA, training=TRAINING),
        round_number=1,
        seed=9,
        on_progress=silent,
    ).slm_adapter


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
    result = device(settings=chosen)
    assert result.kept.tolist() == expected.long().tolist()
    assert 0 < int(result.kept.sum()) < 6
    private_M = row_losses(slm, PRIVATE, max_length=64)
    below = settings(keep="below_private", margin=0.02)
    assert device(settings=below).kept.tolist() == choose_candidates(losses_N, private_M, below).long().tolist()


def test_what_is_sent_are_counts_only() -> None:
    """One whole number a group, which says how many of its candidates were kept and nothing else."""
    result = device()
    assert result.kept.dtype == torch.int64
    assert result.kept.shape == (6,)
    assert ((result.kept >= 0) & (result.kept <= 1)).all()
    # Rows that are kept alike give the same message, whatever the private rows are.
    other = device(private=tiny_examples(12, start=50))
    assert torch.equal(other.kept, result.kept)
    assert not same(other.slm_adapter, result.slm_adapter)
    by_task = device(candidates=[replace(each, group=each.group // 3) for each in OFFERED], num_groups=2)
    assert by_task.kept.tolist() == [int(result.kept[:3].sum()), int(result.kept[3:].sum())]
    # Nothing but that, the number of private rows and the training's mean loss leaves: no other field may.
    assert set(data_based.DataDeviceResult.__dataclass_fields__) == {"slm_adapter", "kept", "num_examples", "losses"}
    assert set(result.losses) == {"slm_ce"}
    assert result.num_examples == 12


@pytest.mark.parametrize("reason", ["no_candidates", "none_kept", "no_share"])
def test_where_nothing_is_added_it_is_the_standalone_baseline_bit_for_bit(reason: str) -> None:
    changes: dict[str, dict[str, Any]] = {
        "no_candidates": {"candidates": []},
        "none_kept": {"settings": settings(keep="below_private", margin=-100.0)},
        "no_share": {"settings": settings(candidate_fraction=0.0)},
    }
    assert same(device(**changes[reason]).slm_adapter, alone())
    assert not same(device().slm_adapter, alone())


def test_only_what_is_kept_is_trained_on() -> None:
    chosen = settings(low_quantile=0.0, high_quantile=0.5)
    result = device(settings=chosen)
    left = [each for each, count in zip(OFFERED, result.kept.tolist(), strict=True) if count]
    assert len(left) == 3
    everything = settings(low_quantile=0.0, high_quantile=1.0)
    assert same(device(candidates=left, settings=everything).slm_adapter, result.slm_adapter)


def test_equal_arguments_give_equal_bits() -> None:
    first, again, other = device(), device(), device(seed=10)
    assert same(first.slm_adapter, again.slm_adapter)
    assert first.losses == again.losses
    assert not same(first.slm_adapter, other.slm_adapter)
    served, repeated = server(), server()
    assert same(served.llm_adapter, repeated.llm_adapter)
    assert served.candidates == repeated.candidates


def test_the_server_counts_what_devices_kept_whatever_their_order() -> None:
    counts = [torch.tensor([1, 0, 1, 0, 0, 0]), torch.tensor([1, 1, 0, 0, 0, 0])]
    first = server(candidates=OFFERED, device_counts=counts, tallies=Tallies.empty(6))
    assert first.tallies.offered_G.tolist() == [2] * 6
    assert first.tallies.kept_G.tolist() == [2, 1, 1, 0, 0, 0]
    turned = server(candidates=OFFERED, device_counts=counts[::-1], tallies=Tallies.empty(6))
    assert turned.candidates == first.candidates
    assert same(turned.llm_adapter, first.llm_adapter)
    later = server(candidates=OFFERED, device_counts=counts, tallies=first.tallies, llm_adapter=first.llm_adapter)
    assert later.tallies.kept_G.tolist() == [4, 2, 2, 0, 0, 0]


def test_counts_by_task() -> None:
    by_task = settings(count_by="task")
    rows = [replace(each, group=each.group % 3) for each in OFFERED]
    served = server(candidates=rows, device_counts=[torch.tensor([2, 0, 1])], settings=by_task)
    assert served.tallies.offered_G.tolist() == [2, 2, 2]
    assert served.tallies.kept_G.tolist() == [2, 0, 1]


def test_the_llm_learns_public_rows_before_it_writes() -> None:
    stages: list[str] = []
    served = server(on_progress=lambda stage, *_: stages.append(stage))
    assert stages == ["public_tuning"] * 3
    assert set(served.losses) == {"llm_ce"}
    still = server(settings=settings(server=ServerSteps(steps=0, max_length=128)))
    assert still.losses == {}
    assert not any(tensor.any() for name, tensor in still.llm_adapter.items() if "lora_B" in name)


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
