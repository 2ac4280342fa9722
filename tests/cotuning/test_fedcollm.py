"""FedCoLLM: what the published code of the paper gets wrong is a test here each, with others of the same parts."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from cotuning.adapters import AdapterState, adapted, fresh_adapter, lora_config
from cotuning.encoded_rows import EncodedRows
from cotuning.encoding import IGNORED_LABEL
from cotuning.evaluation import bits_per_byte
from cotuning.examples import Example
from cotuning.language_model import LanguageModel
from cotuning.seeding import derive_seed
from cotuning.shared_rows import CoverageTooLow
from cotuning.strategies.registry import steps_of
from cotuning.strategies.results import ServerResult
from cotuning.training import draw_batches, row_sizes
from protocol.strategies import FedCoLlmSettings, FedLoraSettings, LoraSettings, MutualDistillation
from tests.cotuning.strategy_inputs import LORA, SEED, device_inputs, same, server_inputs
from tests.cotuning.test_strategies import PRIVATE, PUBLIC, TRAINING, tuned_loss
from tests.tiny_models import tiny_examples, tiny_language_model

ONE_STEP = MutualDistillation(steps=1, batch_size=4, max_length=64, gradient_clip=1e9)


def settings(**changes: Any) -> FedCoLlmSettings:
    values: dict[str, Any] = {"slm_lora": LORA, "llm_lora": LORA, "training": TRAINING, "server": ONE_STEP}
    return FedCoLlmSettings(**values | changes)


class Server:
    """An LLM and the small model of all devices, with the adapters that a round starts from."""

    def __init__(self, llm: str = "llama", slm: str = "llama_proxy") -> None:
        self.llm, self.slm = tiny_language_model(llm), tiny_language_model(slm)
        self.theta, self.omega = (self.fresh(lm, seed) for seed, lm in enumerate((self.slm, self.llm)))
        self.gradients: dict[str, Tensor] = {}

    @staticmethod
    def fresh(lm: LanguageModel, seed: int) -> AdapterState:
        return fresh_adapter(lm, lora_config(lm, **LORA.model_dump()), seed=seed)

    def step(self, public: Sequence[Example] = PUBLIC, chosen: FedCoLlmSettings | None = None) -> ServerResult:
        given = server_inputs(
            on_progress=self._keep_gradients,
            llm=self.llm,
            shared_model=self.slm,
            shared_adapter=self.theta,
            llm_adapter=self.omega,
            public=public,
        )
        return steps_of(chosen or settings()).server_step(given)

    def _keep_gradients(self, stage: str, step: int, steps: int, losses: dict[str, float]) -> None:
        """Of the step just taken; a step's gradients stay until the next one begins."""
        for name, lm in (("llm", self.llm), ("slm", self.slm)):
            parts = [
                tensor.grad.flatten()
                for key, tensor in sorted(lm.model.named_parameters())
                if ".lora_" in key and tensor.grad is not None
            ]
            if parts:
                self.gradients[name] = torch.cat(parts)


def first_batch(lm: LanguageModel, public: Sequence[Example] = PUBLIC) -> tuple[Tensor, Tensor]:
    """Token ids and labels of the rows of the first step."""
    seed = derive_seed(SEED, "rows", 1)
    rows = draw_batches(row_sizes(public), batch_size=ONE_STEP.batch_size, steps=ONE_STEP.steps, seed=seed)[0]
    batch = EncodedRows(lm, public, max_length=ONE_STEP.max_length).batch(rows)
    return batch.input_ids_BT, batch.labels_BT


def slow_log_probs(lm: LanguageModel, ids_BT: Tensor) -> Tensor:
    """The model's whole distributions, as transformers gives them."""
    logits_BTV: Tensor = lm.model(input_ids=ids_BT).logits
    return logits_BTV[..., : lm.table.num_tokens].log_softmax(-1)


def slow_terms(world: Server) -> dict[str, Tensor]:
    """Each term by a formula that shares nothing with ours, adapters being new and so without effect."""
    ids_BT, labels_BT = first_batch(world.slm)
    llm_BTV, slm_BTV = slow_log_probs(world.llm, ids_BT), slow_log_probs(world.slm, ids_BT)
    terms: dict[str, list[Tensor]] = {name: [] for name in ("llm_ce", "slm_ce", "llm_kl", "slm_kl")}
    for row, labels in enumerate(labels_BT.tolist()):
        for place, label in enumerate(labels):
            if label != IGNORED_LABEL:  # the token at `place` is predicted by the one before it
                g, f = llm_BTV[row, place - 1], slm_BTV[row, place - 1]
                terms["llm_ce"].append(-g[label])
                terms["slm_ce"].append(-f[label])
                terms["llm_kl"].append((f.detach().exp() * (f.detach() - g)).sum())
                terms["slm_kl"].append((g.detach().exp() * (g.detach() - f)).sum())
    return {name: torch.stack(values).mean() for name, values in terms.items()}


def test_the_teacher_is_whole_distributions_and_not_ids_rebuilt() -> None:
    world = Server()
    losses, expected = world.step().losses, slow_terms(world)
    for name in ("llm_kl", "slm_kl"):
        assert losses[name] == pytest.approx(float(expected[name]), rel=1e-4)
        assert losses[name] > 1e-4
    # A teacher that is surer of the same tokens teaches something else; rebuilt from its ids it would not.
    with torch.no_grad():
        world.llm.model.lm_head.weight *= 3.0
    assert world.step().losses["slm_kl"] > 1.5 * losses["slm_kl"]


@pytest.mark.parametrize("side", ["llm", "slm"])
def test_the_distillation_terms_gradient_is_not_zero_and_scales_with_its_weight(side: str) -> None:
    world, gradients = Server(), []
    for weight in (0.0, 1.0, 2.0):
        world.step(chosen=settings(distillation_weight=weight))
        gradients.append(world.gradients[side])
    of_one, of_two = gradients[1] - gradients[0], gradients[2] - gradients[0]
    assert float(of_one.norm()) > 1e-3 * float(gradients[0].norm()) > 0
    torch.testing.assert_close(of_two, 2.0 * of_one, rtol=1e-3, atol=1e-6)


def test_the_gradient_is_that_of_the_slow_formula() -> None:
    world = Server()
    world.step(chosen=settings(distillation_weight=0.7))
    ours = world.gradients["slm"]
    with adapted(world.slm, lora_config(world.slm, **LORA.model_dump()), {"shared": world.theta}) as lent:
        parameters = [tensor for name, tensor in sorted(lent.model.named_parameters()) if ".lora_" in name]
        for tensor in parameters:
            tensor.requires_grad_(True)
        slow = Server()
        slow.slm = lent
        terms = slow_terms(slow)
        expected = torch.autograd.grad(terms["slm_ce"] + 0.7 * terms["slm_kl"], parameters)
    torch.testing.assert_close(ours, torch.cat([each.flatten() for each in expected]), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_the_kl_of_a_model_with_itself_is_zero(divergence: str) -> None:
    world = Server("llama", "llama")
    losses = world.step(chosen=settings(divergence=divergence)).losses
    assert losses["llm_kl"] == pytest.approx(0.0, abs=1e-6)
    assert losses["slm_kl"] == pytest.approx(0.0, abs=1e-6)
    assert losses["llm_ce"] == losses["slm_ce"] > 1.0


def test_the_label_mask_is_not_off_by_one() -> None:
    world = Server()
    losses, expected = world.step().losses, slow_terms(world)
    for name in ("llm_ce", "slm_ce"):
        assert losses[name] == pytest.approx(float(expected[name]), rel=1e-5)
    # What the responses begin with is learnt, what the prompts end with is not: another prompt's labels do not count.
    ids_BT, labels_BT = first_batch(world.slm)
    for ids, labels in zip(ids_BT.tolist(), labels_BT.tolist(), strict=True):
        learnt = [token for token, label in zip(ids, labels, strict=True) if label != IGNORED_LABEL]
        text = world.slm.tokenizer.decode(learnt, skip_special_tokens=True)
        assert text in {row.output for row in PUBLIC}


def test_the_distillation_term_is_a_mean_per_token_as_the_task_loss() -> None:
    row, gradients, losses = PUBLIC[:1], [], []
    for batch_size in (1, 8):  # the same row once, or eight times, in a step
        world = Server()
        server = ONE_STEP.model_copy(update={"batch_size": batch_size})
        losses.append(world.step(row, settings(server=server)).losses)
        gradients.append(world.gradients["slm"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-7)


def test_the_distilled_adapter_is_what_the_server_publishes() -> None:
    world = Server()
    result = world.step()
    assert result.shared_adapter is not None
    assert result.shared_adapter.keys() == world.theta.keys()
    assert not same(result.shared_adapter, world.theta)
    alone = world.step(chosen=settings(distillation_weight=0.0))
    assert not same(result.shared_adapter, alone.shared_adapter or {})  # not cross-entropy alone, either


def test_the_aggregate_is_the_mean_and_not_the_sum() -> None:
    world = Server()
    aggregator = steps_of(settings()).aggregator(world.theta, None)
    delta = {name: torch.full_like(tensor, 0.5) for name, tensor in world.theta.items()}
    for weight in (1.0, 3.0, 4.0):
        aggregator.add(delta, weight)
    mean = aggregator.result().adapter
    assert same(mean, {name: tensor + 0.5 for name, tensor in world.theta.items()})


def test_devices_do_what_fed_loras_do() -> None:
    world = Server()
    given = device_inputs(world.slm, PRIVATE, shared_adapter=world.theta)
    plain = FedLoraSettings(slm_lora=LORA, training=TRAINING)
    assert same(steps_of(settings()).device_step(given).delta, steps_of(plain).device_step(given).delta)


MANY = MutualDistillation(steps=12, batch_size=4, max_length=64, llm_learning_rate=1e-2, slm_learning_rate=1e-2)


@pytest.mark.parametrize(
    ("schedule", "stages"),
    [
        ("interleaved", ["server_mutual_distillation"] * 12),
        ("sequential", ["server_llm_distillation"] * 12 + ["server_slm_distillation"] * 12),
    ],
)
@pytest.mark.parametrize("slm", ["llama_proxy", "gpt2", "bloom"])
def test_both_models_learn_with_any_pair_of_tokenizers(schedule: str, stages: list[str], slm: str) -> None:
    world, seen = Server(slm=slm), []
    chosen = settings(server=MANY.model_copy(update={"schedule": schedule}))
    world._keep_gradients = lambda stage, *_: seen.append(stage)  # type: ignore[method-assign]
    result = world.step(chosen=chosen)
    assert seen == stages
    assert set(result.losses) == {"llm_ce", "llm_kl", "slm_ce", "slm_kl"}
    assert tuned_loss(world.llm, result.llm_adapter or {}, PUBLIC) < bits_per_byte(world.llm, PUBLIC)
    assert tuned_loss(world.slm, result.shared_adapter or {}, PUBLIC) < bits_per_byte(world.slm, PUBLIC)
    again = Server(slm=slm).step(chosen=chosen)
    assert same(result.shared_adapter or {}, again.shared_adapter or {})
    assert same(result.llm_adapter or {}, again.llm_adapter or {})
    assert not hasattr(world.slm.model, "peft_config")


def test_in_sequence_the_small_model_learns_from_what_became_of_the_llm() -> None:
    results = [
        Server().step(chosen=settings(server=MANY.model_copy(update={"schedule": schedule})))
        for schedule in ("interleaved", "sequential")
    ]
    assert not same(results[0].shared_adapter or {}, results[1].shared_adapter or {})
    # The LLM's pupil is taught by an LLM that does not move any more, so its own loss is that of its end.
    world = Server()
    world.omega = results[1].llm_adapter or {}
    with adapted(world.llm, lora_config(world.llm, **LORA.model_dump()), {"llm": world.omega}) as lent:
        world.llm = lent
        last = slow_terms(world)["llm_ce"]
    one = Server()
    one.omega = world.omega
    frozen = settings(server=ONE_STEP.model_copy(update={"schedule": "sequential", "llm_learning_rate": 1e-12}))
    assert one.step(chosen=frozen).losses["llm_ce"] == pytest.approx(float(last), rel=1e-4)


def test_no_steps_publish_the_average() -> None:
    world = Server()
    result = world.step(chosen=settings(server=ONE_STEP.model_copy(update={"steps": 0})))
    assert same(result.shared_adapter or {}, world.theta)
    assert same(result.llm_adapter or {}, world.omega)


def test_the_llms_first_adapter_follows_from_the_seed() -> None:
    world = Server()
    world.omega = None  # type: ignore[assignment]
    config = lora_config(world.llm, **LORA.model_dump())
    expected = fresh_adapter(world.llm, config, seed=derive_seed(SEED, "llm_adapter"))
    none = settings(server=ONE_STEP.model_copy(update={"steps": 0}))
    assert same(world.step(chosen=none).llm_adapter or {}, expected)


def test_public_rows_that_do_not_align_are_refused_before_any_step() -> None:
    world = Server(slm="gpt2")
    rows = tiny_examples(4, start=100)
    stages: list[str] = []
    world._keep_gradients = lambda stage, *_: stages.append(stage)  # type: ignore[method-assign]
    short = ONE_STEP.model_copy(update={"max_length": 16})
    long = [Example(row.id, row.instruction, row.input, "word " * 60) for row in rows]
    chosen = settings(server=short, min_coverage=1.0, slm_lora=LoraSettings(rank=2, alpha=4.0))
    with pytest.raises(CoverageTooLow, match=r"expected at least 1\.000"):
        world.step(long, chosen)
    assert stages == []


def test_in_sequence_one_model_moves_at_a_time() -> None:
    world, seen = Server(), []

    def look(stage: str, *_: Any) -> None:
        values = [
            torch.cat([tensor.detach().flatten() for key, tensor in lm.model.named_parameters() if ".lora_" in key])
            for lm in (world.llm, world.slm)
        ]
        seen.append((stage, *values))

    world._keep_gradients = look  # type: ignore[method-assign]
    world.step(chosen=settings(server=MANY.model_copy(update={"schedule": "sequential", "steps": 3})))
    llm_stage, slm_stage = seen[:3], seen[3:]
    assert all(torch.equal(slm, llm_stage[0][2]) for _, _, slm in llm_stage)
    assert all(torch.equal(llm, slm_stage[0][1]) for _, llm, _ in slm_stage)
    assert not torch.equal(llm_stage[0][1], llm_stage[1][1])
    assert not torch.equal(slm_stage[0][2], slm_stage[1][2])
