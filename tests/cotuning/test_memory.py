"""The estimate against what torch's allocator really handed out on the CPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig

from cotuning.adapters import activate, adapted, lora_config
from cotuning.encoded_rows import EncodedRows
from cotuning.examples import Example
from cotuning.language_model import LanguageModel
from cotuning.memory import MemoryEstimate, NotEnoughMemory, estimate_memory, longest_row, require_memory, together
from cotuning.mutual_learning import Party, learn_mutually
from cotuning.proxy import distil_proxy
from cotuning.shared_rows import share_rows
from cotuning.tuning import tune_adapter
from tests.tiny_models import tiny_language_model

BATCH_SIZE, LENGTH = 4, 160
FACTOR = 1.35
"""The estimate may be so many times too high; too low by no more than a tenth."""


def larger(name: str, *, layers: int = 3, width: int = 96) -> LanguageModel:
    """A model whose activations outweigh everything that is not counted."""
    like = tiny_language_model(name)
    config = like.model.config
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 4}
    if hasattr(config, "num_key_value_heads"):
        sizes["num_key_value_heads"] = 2
    for key, factor in (("intermediate_size", 3), ("ffn_dim", 4), ("word_embed_proj_dim", 1)):
        if hasattr(config, key):
            sizes[key] = factor * width
    if getattr(config, "head_dim", None):
        sizes["head_dim"] = width // 4
    if getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"] * layers
    for key, value in sizes.items():
        setattr(config, key, value)
    return like.with_model(AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False))


def rows(lm: LanguageModel) -> list[Example]:
    """Cut to `LENGTH` tokens with every tokenizer."""
    return [Example(str(number), "Say.", "", f"{number} the blue stone " * 200) for number in range(BATCH_SIZE)]


def silent(stage: str, step: int, steps: int, losses: dict[str, float]) -> None:
    pass


def peak_bytes(run: Callable[[], object]) -> int:
    """Greatest sum of what was allocated and not yet freed during `run`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events: list[Any] = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def weights(lm: LanguageModel) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in lm.model.parameters())


def assert_close(estimate: int, measured: int) -> None:
    ratio = estimate / measured
    assert 0.9 <= ratio <= FACTOR, f"estimate {estimate:,}, measured {measured:,}: {ratio:.3f}"


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "bloom", "opt"])
def test_an_adapters_step(name: str, precision: Any, checkpointing: bool) -> None:
    lm = larger(name)
    encoded = EncodedRows(lm, rows(lm), max_length=LENGTH)
    encoded.encode(range(BATCH_SIZE))
    assert encoded.batch([0, 1, 2, 3]).input_ids_BT.shape == (BATCH_SIZE, LENGTH)
    with adapted(lm, lora_config(lm, rank=4, alpha=4.0), {"slm": 1}) as lent:
        activate(lent, ["slm"], trainable=["slm"])

        def step() -> None:
            tune_adapter(
                lent,
                "slm",
                encoded,
                [[0, 1, 2, 3]],
                learning_rate=1e-3,
                precision=precision,
                gradient_checkpointing=checkpointing,
                seed=0,
                stage="test",
                on_progress=silent,
            )

        step()
        measured = peak_bytes(step) + weights(lent)
    estimate = estimate_memory(
        lm.model.config,
        learns="adapter",
        rank=4,
        batch_size=BATCH_SIZE,
        length=LENGTH,
        precision=precision,
        gradient_checkpointing=checkpointing,
    )
    assert_close(estimate.total, measured)


@pytest.mark.parametrize("names", [("gpt2", "llama"), ("bloom", "opt")])
def test_two_models_that_teach_each_other(names: tuple[str, str]) -> None:
    """Both forward passes come before both backward passes, so the two estimates add up."""
    a, b = (larger(name) for name in names)
    encoded = [EncodedRows(lm, rows(lm), max_length=LENGTH) for lm in (a, b)]
    config_a, config_b = (lora_config(lm, rank=4, alpha=4.0) for lm in (a, b))
    with adapted(a, config_a, {"slm": 1}) as lent_a, adapted(b, config_b, {"shared": 1, "domain": 2}) as lent_b:
        activate(lent_a, ["slm"], trainable=["slm"])
        activate(lent_b, ["shared", "domain"], trainable=["shared"])
        for each, lent in zip(encoded, (lent_a, lent_b), strict=True):
            each.lm = lent
        shared = share_rows(encoded[0], encoded[1], [[0, 1, 2, 3]], min_coverage=0.0)
        parties = Party("slm", lent_a, "slm", 1e-3, 1.0), Party("proxy", lent_b, "shared", 1e-3, 1.0)

        def step() -> None:
            learn_mutually(*parties, shared, seed=0, stage="test", on_progress=silent)

        step()
        measured = peak_bytes(step) + weights(lent_a) + weights(lent_b)
    sizes: dict[str, Any] = {"learns": "adapter", "rank": 4, "batch_size": BATCH_SIZE, "length": LENGTH}
    estimates = estimate_memory(a.model.config, **sizes), estimate_memory(b.model.config, adapters=2, **sizes)
    assert_close(together(estimates), measured)


def test_a_whole_proxy_that_learns_from_a_model_that_is_only_read() -> None:
    llm, proxy = larger("llama", width=128), larger("llama", layers=2)
    examples = rows(llm) * 2

    def step() -> None:
        distil_proxy(
            llm,
            proxy,
            examples,
            steps=1,
            batch_size=BATCH_SIZE,
            learning_rate=1e-3,
            distillation_weight=0.5,
            temperature=1.0,
            max_length=LENGTH,
            seed=0,
            on_progress=silent,
        )

    step()
    measured = peak_bytes(step) + weights(llm) + weights(proxy)
    read = estimate_memory(llm.model.config, learns="nothing", batch_size=BATCH_SIZE, length=LENGTH)
    learned = estimate_memory(proxy.model.config, learns="everything", batch_size=BATCH_SIZE, length=LENGTH)
    assert (read.gradients, read.optimizer, read.activations) == (0, 0, 0)
    assert read.weights == weights(llm)
    assert learned.weights == learned.gradients == learned.optimizer // 2 == weights(proxy)
    assert_close(together([read, learned]), measured)


def test_four_bits_and_bfloat16_weigh_what_they_should() -> None:
    config = larger("llama").model.config
    sizes: dict[str, Any] = {"learns": "nothing", "batch_size": 1, "length": 16}
    whole = estimate_memory(config, **sizes)
    half = estimate_memory(config, dtype=torch.bfloat16, **sizes)
    quarter = estimate_memory(config, dtype=torch.bfloat16, four_bit=True, **sizes)
    assert half.weights == whole.weights // 2
    width, inner, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    linear = 3 * (
        width * width * 2 + 2 * width * width // 2 + 3 * width * inner
    )  # q, o; k, v of 2 of 4 heads; feed-forward
    norms = 7 * width
    assert quarter.weights == pytest.approx(linear * (0.5 + 1 / 64) + 2 * (norms + 2 * vocabulary * width), rel=1e-3)


def test_nothing_is_allocated_for_an_estimate() -> None:
    """An LLM of 7 billion weights, estimated on any machine."""
    config = LlamaConfig(num_hidden_layers=32)  # 4096 wide, 32000 tokens
    measured = peak_bytes(
        lambda: estimates.append(estimate_memory(config, learns="adapter", batch_size=8, length=1024))
    )
    assert measured < 50_000_000
    assert estimates[0].weights > 26e9
    estimates.clear()


estimates: list[MemoryEstimate] = []


@pytest.mark.parametrize("name", ["llama", "bloom"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_many_layers_are_estimated_from_few(name: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = larger(name, layers=7, width=32).model.config
    sizes: dict[str, Any] = {
        "learns": "adapter",
        "batch_size": 2,
        "length": 40,
        "gradient_checkpointing": checkpointing,
    }
    few = estimate_memory(config, **sizes)
    monkeypatch.setattr("cotuning.memory._FEW_LAYERS", 100)
    every = estimate_memory(config, **sizes)
    assert (few.weights, few.gradients, few.layers) == (every.weights, every.gradients, 7)
    assert few.activations == pytest.approx(every.activations, rel=0.01)
    assert few.total == pytest.approx(every.total, rel=0.02)


def test_the_longest_row_is_found() -> None:
    lm = tiny_language_model("gpt2")
    examples = [Example(str(number), "Say.", "", "blue stone " * number) for number in range(60)]
    batch = EncodedRows(lm, examples, max_length=10_000).batch(range(60))
    longest = longest_row(lm.tokenizer, examples, max_length=10_000)
    assert batch.input_ids_BT.shape[1] == longest
    assert longest_row(lm.tokenizer, examples, max_length=50) == 50


def test_layers_are_dealt_over_devices() -> None:
    config = larger("llama", layers=4).model.config
    one = estimate_memory(config, learns="adapter", batch_size=4, length=64)
    assert one.kept_on_fullest_of(1) + one.working == one.total == together([one])
    two, four, many = (one.kept_on_fullest_of(count) for count in (2, 4, 99))
    kept = one.total - one.working
    assert kept > two > four == many > 0
    assert two == pytest.approx(kept * (1 - one.layer_share / 2), rel=1e-6)


def test_a_training_that_cannot_fit_is_refused_with_both_numbers() -> None:
    estimate = estimate_memory(larger("llama").model.config, learns="adapter", batch_size=4, length=64)
    needed = 2 * estimate.total - estimate.working
    require_memory({"slm": estimate, "proxy": estimate}, {"cpu": needed})
    with pytest.raises(NotEnoughMemory, match="not enough memory on cpu: expected to need") as caught:
        require_memory({"slm": estimate, "proxy": estimate}, {"cpu": needed - 1})
    error = caught.value
    assert (error.expected_bytes, error.available_bytes) == (needed, needed - 1)
    assert str(error.expected_bytes) in str(error)
    assert str(error.available_bytes) in str(error)
    assert "gradient checkpointing" in str(error)
    per_device = together([estimate], devices=2)
    require_memory({"slm": estimate}, {"cuda:0": per_device, "cuda:1": per_device})
    with pytest.raises(NotEnoughMemory, match="on cuda:0"):
        require_memory({"slm": estimate}, {"cuda:0": per_device - 1, "cuda:1": per_device})
