"""A step of mutual learning makes no tensor on another device than its models'."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from cotuning.adapters import activate, adapted, lora_config
from cotuning.encoded_rows import EncodedRows
from cotuning.encoding import EncodedBatch
from cotuning.mutual_learning import Party, learn_mutually
from cotuning.shared_rows import share_rows
from tests.cotuning.pretended_card import PretendedCard, WrongDevice, on_card, place
from tests.tiny_models import tiny_examples, tiny_language_model

ROWS = tiny_examples(4)


class SentRows(EncodedRows):
    """On a processor `EncodedRows` has nothing to send; on a card it sends every batch, as this does."""

    def batch(self, indices: Sequence[int]) -> EncodedBatch:
        return super().batch(indices).to(torch.device("cpu"))


def silent(*_: Any) -> None:
    pass


def test_the_pretended_card_refuses_what_a_card_would() -> None:
    layer = torch.nn.Linear(3, 2)
    place(layer)
    with PretendedCard():
        for made_there in (torch.ones(2, 3, device="cpu"), torch.ones(2, 3).to(torch.device("cpu"))):
            assert on_card(layer(made_there))
            assert on_card(made_there.new_zeros(3) + layer.weight)
        assert on_card(layer.weight * torch.tensor(2.0))
        with pytest.raises(WrongDevice, match=r"linear mixes .* shape \[2, 3\]"):
            layer(torch.ones(2, 3))
        with pytest.raises(WrongDevice, match="index_select"):
            layer.weight.index_select(0, torch.arange(1))
        torch.arange(3) + torch.zeros(3)  # both on the processor


@pytest.mark.parametrize("names", [("llama", "gpt2"), ("llama", "llama_proxy")])
@pytest.mark.parametrize("matching", ["fold", "uld", "gold", "mined_dtw", "alm"])
def test_a_step_stays_on_its_device(names: tuple[str, str], matching: Any) -> None:
    lms = [tiny_language_model(name) for name in names]
    configs = [lora_config(lm, rank=2, alpha=4.0) for lm in lms]
    with adapted(lms[0], configs[0], {"x": 1}) as a, adapted(lms[1], configs[1], {"y": 2}) as b:
        activate(a, ["x"], trainable=["x"])
        activate(b, ["y"], trainable=["y"])
        for lm in (a, b):
            place(lm.model)
        with PretendedCard():
            rows = [SentRows(lm, ROWS, max_length=64) for lm in (a, b)]
            shared = share_rows(rows[0], rows[1], [[0, 1], [2, 3]], min_coverage=0.5)
            losses = learn_mutually(
                Party("a", a, "x", 1e-2, 1.0),
                Party("b", b, "y", 1e-2, 1.0),
                shared,
                matching=matching,
                span_likelihood_weight=0.1 if matching == "fold" else 0.0,
                seed=0,
                stage="test",
                on_progress=silent,
            )
    assert losses["a_ce"] > 0
