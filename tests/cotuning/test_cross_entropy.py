import pytest
import torch
from torch.nn import functional

from cotuning.cross_entropy import cross_entropy, response_tokens
from cotuning.encoding import encode_batch
from cotuning.examples import render_prompt
from cotuning.heads import Head
from cotuning.language_model import hidden_states, output_head
from tests.tiny_models import tiny_examples, tiny_language_model


def test_equals_the_models_own_shifted_loss() -> None:
    lm = tiny_language_model("qwen2")
    rows = tiny_examples(5)
    prompts = [render_prompt(lm.tokenizer, row) for row in rows]
    batch = encode_batch(lm.tokenizer, lm.table, prompts, [row.output for row in rows], max_length=64)
    tokens = response_tokens(batch)
    with torch.no_grad():
        hidden_BTD = hidden_states(lm, batch.input_ids_BT)
        loss, _ = cross_entropy(hidden_BTD[tokens.sample_N, tokens.position_N], output_head(lm), tokens.target_N)
        own = lm.model(
            input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, labels=batch.labels_BT
        ).loss
    torch.testing.assert_close(loss, own)


def test_by_hand() -> None:
    # Two classes with logits (0, log 3): probabilities 1/4 and 3/4.
    head = Head(weight_VD=torch.tensor([[0.0], [1.0]]), num_tokens=2)
    hidden_ND = torch.tensor([[3.0], [3.0]]).log()
    loss, losses_N = cross_entropy(hidden_ND, head, torch.tensor([0, 1]))
    expected_N = -torch.tensor([0.25, 0.75]).log()
    torch.testing.assert_close(losses_N, expected_N)
    torch.testing.assert_close(loss, expected_N.mean())


@pytest.mark.parametrize("chunk_rows", [1, 3, 100])
@pytest.mark.parametrize("variant", ["plain", "bias", "scale", "soft_cap", "smoothed"])
def test_value_and_gradients_equal_torch(chunk_rows: int, variant: str) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden_ND, weight_VD, bias_V = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((7, 4), (11, 4), (11,))
    )
    target_N = torch.randint(0, 9, (7,), generator=generator)
    scale, cap = (0.5 if variant == "scale" else 1.0), (3.0 if variant == "soft_cap" else None)
    inputs = [tensor.clone().requires_grad_() for tensor in (hidden_ND, weight_VD, bias_V)]
    head = Head(inputs[1], 9, inputs[2] if variant == "bias" else None, scale, cap)
    smoothing = 0.2 if variant == "smoothed" else 0.0
    loss, _ = cross_entropy(inputs[0], head, target_N, label_smoothing=smoothing, chunk_rows=chunk_rows)
    (2 * loss).backward()

    slow = [tensor.clone().requires_grad_() for tensor in (hidden_ND, weight_VD, bias_V)]
    logits_NV = slow[0] @ slow[1][:9].T + (slow[2][:9] if variant == "bias" else 0)
    logits_NV = logits_NV * scale
    logits_NV = cap * torch.tanh(logits_NV / cap) if cap else logits_NV
    expected = functional.cross_entropy(logits_NV, target_N, label_smoothing=smoothing)
    (2 * expected).backward()
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(inputs, slow, strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_half_precision_is_close_and_sums_in_float32(how: str) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden_ND, weight_VD = (torch.randn(*shape, generator=generator) for shape in ((40, 8), (30, 8)))
    target_N = torch.randint(0, 30, (40,), generator=generator)
    exact = [tensor.double().requires_grad_() for tensor in (hidden_ND, weight_VD)]
    functional.cross_entropy(exact[0] @ exact[1].T, target_N).backward()
    dtype = torch.bfloat16 if how == "bfloat16" else torch.float32
    inputs = [tensor.to(dtype).requires_grad_() for tensor in (hidden_ND, weight_VD)]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        loss, losses_N = cross_entropy(inputs[0], Head(inputs[1], 30), target_N, chunk_rows=16)
    loss.backward()
    assert loss.dtype == losses_N.dtype == torch.float32
    for ours, theirs in zip(inputs, exact, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert ours.grad.dtype == dtype
        assert (ours.grad.double() - theirs.grad).abs().max() <= 0.02 * theirs.grad.abs().max()


def test_no_response_tokens_give_zero() -> None:
    head = Head(weight_VD=torch.ones(3, 2), num_tokens=3)
    loss, losses_N = cross_entropy(torch.zeros(0, 2), head, torch.zeros(0, dtype=torch.int64))
    assert loss == 0
    assert len(losses_N) == 0
