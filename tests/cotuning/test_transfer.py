from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from cotuning.adapters import activate, adapted, lora_config
from cotuning.cross_entropy import response_tokens
from cotuning.encoded_rows import EncodedRows
from cotuning.encoding import EncodedBatch
from cotuning.heads import Head
from cotuning.probe_logits import row_losses
from cotuning.transfer import transfer_steps
from tests.tiny_models import tiny_examples, tiny_language_model

ROWS = tiny_examples(5)


class Square:
    """A lesson on every second row: the mean of its hidden states' squares."""

    name = "square"

    def count(self, indices: Sequence[int], batch: EncodedBatch) -> int:
        return sum(index % 2 == 0 for index in indices)

    def loss(
        self, indices: Sequence[int], batch: EncodedBatch, hidden_BTD: Tensor, head: Head, *, count: int
    ) -> Tensor | None:
        places = [place for place, index in enumerate(indices) if index % 2 == 0]
        if not places:
            return None
        return sum((hidden_BTD[place, 0].square().mean() for place in places), torch.zeros(())) / count


def objective(weight: float, micro: int | None, batch: list[int]) -> tuple[float, dict[str, float], Tensor]:
    """The sum of a step's parts, of what they report, and the gradient of one tensor."""
    lm = tiny_language_model("gpt2")
    with adapted(lm, lora_config(lm, rank=2, alpha=4.0), {"slm": 3}) as lent:
        activate(lent, ["slm"], trainable=["slm"])
        rows = EncodedRows(lent, ROWS, max_length=64)
        step_at = transfer_steps(lent, "slm", rows, [batch], Square(), ce_weight=weight, micro_batch_size=micro)
        total, report = 0.0, dict[str, float]()
        for part in step_at(0):
            part.objectives["slm"].backward()  # type: ignore[no-untyped-call]
            total += float(part.objectives["slm"].detach())
            for name, value in part.report.items():
                report[name] = report.get(name, 0.0) + float(value)
        gradients = [tensor.grad for tensor in lent.model.parameters() if tensor.grad is not None]
        return total, report, torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.parametrize("micro", [None, 2, 1])
@pytest.mark.parametrize("weight", [0.0, 0.3, 0.9])
def test_the_objective_is_the_weighted_sum_of_its_terms(weight: float, micro: int | None) -> None:
    batch = [4, 1, 0, 3]
    total, report, gradient = objective(weight, micro, batch)
    lm = tiny_language_model("gpt2")
    encoded = EncodedRows(lm, ROWS, max_length=64)
    tokens = [len(response_tokens(encoded.batch([index])).target_N) for index in batch]
    losses = [float(loss) for loss in row_losses(lm, [ROWS[index] for index in batch], max_length=64)]
    entropy = sum(loss * count for loss, count in zip(losses, tokens, strict=True)) / sum(tokens)
    with torch.no_grad():
        states = [lm.decoder(input_ids=encoded.batch([index]).input_ids_BT).last_hidden_state for index in (4, 0)]
    lesson = sum(float(state[0, 0].square().mean()) for state in states) / 2
    assert report["cross_entropy"] == pytest.approx(entropy, rel=1e-5)
    assert report["square"] == pytest.approx(lesson, rel=1e-5)
    assert total == pytest.approx(weight * entropy + (1 - weight) * lesson, rel=1e-5)
    whole = objective(weight, None, batch)[2]
    torch.testing.assert_close(gradient, whole, atol=1e-6, rtol=1e-3)
    ends = [objective(share, None, batch)[2] for share in (0.0, 1.0)]
    torch.testing.assert_close(whole, weight * ends[1] + (1 - weight) * ends[0], atol=1e-5, rtol=1e-3)


def test_rows_that_nobody_teaches_have_their_cross_entropy_alone() -> None:
    total, report, _ = objective(0.5, None, [1, 3])
    assert set(report) == {"cross_entropy"}
    assert total == pytest.approx(0.5 * report["cross_entropy"])


@pytest.mark.parametrize("weight", [-0.1, 1.1])
def test_a_weight_out_of_range_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match=rf"in 0\.\.1, got {weight}"):
        objective(weight, None, [0])
