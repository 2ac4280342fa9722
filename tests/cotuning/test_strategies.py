from dataclasses import replace
from typing import Any

import pytest
import torch

from cotuning.adapters import AdapterMismatch, AdapterState, adapted, adapter_state, fresh_adapter, lora_config
from cotuning.aggregation import StreamingMean, apply_server_update
from cotuning.encoded_rows import EncodedRows
from cotuning.evaluation import bits_per_byte
from cotuning.examples import Example
from cotuning.language_model import LanguageModel
from cotuning.probe_logits import probe_payload
from cotuning.proxy_creation import create_proxy
from cotuning.shared_rows import CoverageTooLow, measure_alignment, share_rows
from cotuning.strategies import co_plms
from cotuning.strategies.registry import steps_of
from cotuning.strategies.results import DeviceResult, ServerResult
from protocol.strategies import CoPlmsSettings, LocalTraining, ServerTraining, StandaloneSettings
from tests.cotuning.strategy_inputs import LORA, device_inputs, same, server_inputs, tuned_alone
from tests.tiny_models import tiny_examples, tiny_language_model

PRIVATE = tiny_examples(16)
PUBLIC = tiny_examples(20, start=100)
PROBE = tiny_examples(6, start=200)
TRAINING = LocalTraining(steps=6, batch_size=4, learning_rate=1e-2, max_length=64)


def settings(**changes: Any) -> CoPlmsSettings:
    values: dict[str, Any] = {
        "slm_lora": LORA,
        "proxy_lora": LORA,
        "llm_lora": LORA,
        "training": TRAINING,
        "domain_steps": 3,
        "proxy_learning_rate": 1e-2,
        "top_k": 8,
        "server": ServerTraining(steps=5, batch_size=4, max_length=64, llm_learning_rate=1e-2),
    }
    return CoPlmsSettings(**values | changes)


class World:
    """An LLM, its proxy and an SLM, with the shared adapter that a round starts from."""

    def __init__(self, slm: str = "gpt2") -> None:
        self.llm = tiny_language_model("llama")
        self.proxy = create_proxy(self.llm, source="prune", layers=2, seed=0)
        self.slm = tiny_language_model(slm)
        self.theta = fresh_adapter(self.proxy, lora_config(self.proxy, **LORA.model_dump()), seed=1)

    def device(self, **changes: Any) -> DeviceResult:
        values: dict[str, Any] = {"slm": self.slm, "private": PRIVATE, "probe": PROBE}
        values |= {"shared_model": self.proxy, "shared_adapter": self.theta}
        chosen = changes.pop("settings", settings())
        return co_plms.device_step(device_inputs(**values | changes), chosen)

    def server(self, **changes: Any) -> ServerResult:
        values: dict[str, Any] = {"llm": self.llm, "public": PUBLIC, "probe": PROBE}
        values |= {"shared_model": self.proxy, "shared_adapter": self.theta}
        chosen = changes.pop("settings", settings())
        return co_plms.server_step(server_inputs(**values | changes), chosen)

    def parse(self, result: DeviceResult) -> Any:
        return co_plms.parse_logits(
            result.logits,
            result.logits_metadata,
            proxy=self.proxy,
            probe=PROBE,
            places=co_plms.logits_places(self.proxy, PROBE, settings()),
            settings=settings(),
        )


def tuned_loss(lm: LanguageModel, state: AdapterState, rows: list[Example]) -> float:
    with adapted(lm, lora_config(lm, **LORA.model_dump()), {"any": state}) as lent:
        return bits_per_byte(lent, rows)


@pytest.mark.parametrize("slm", ["gpt2", "qwen2", "bloom", "opt", "llama"])
def test_a_round_of_a_device_with_every_pair_of_architecture_and_tokenizer(slm: str) -> None:
    world = World(slm)
    stages: list[tuple[str, int, int]] = []
    before = bits_per_byte(world.slm, PRIVATE)
    result = world.device(on_progress=lambda stage, step, steps, losses: stages.append((stage, step, steps)))
    assert stages == [
        *[("domain_tuning", step, 3) for step in (1, 2, 3)],
        *[("mutual_learning", step, 6) for step in (1, 2, 3, 4, 5, 6)],
    ]
    assert result.num_examples == len(PRIVATE)
    assert set(result.losses) == {"domain_ce", "slm_ce", "slm_kl", "proxy_ce", "proxy_kl"}
    assert all(value >= 0 for value in result.losses.values())
    assert result.alignment is not None
    assert result.alignment.coverage > 0.99
    assert result.alignment.class_agreement > 0.9
    assert tuned_loss(world.slm, result.slm_adapter, PRIVATE) < before
    assert any(bool(tensor.any()) for tensor in result.delta.values())
    assert result.delta.keys() == world.theta.keys()


def test_equal_arguments_give_equal_bits_and_models_come_back_as_they_went() -> None:
    world = World()
    weights = {
        name: tensor.clone()
        for lm in (world.slm, world.proxy)
        for name, tensor in lm.model.state_dict(prefix=lm.architecture).items()
    }
    generator = torch.get_rng_state()
    first = world.device()
    assert torch.equal(torch.get_rng_state(), generator)
    for lm in (world.slm, world.proxy):
        for name, tensor in lm.model.state_dict(prefix=lm.architecture).items():
            assert torch.equal(tensor, weights[name])
    torch.rand(5)
    again, other_seed = World().device(), world.device(seed=10)
    assert same(first.delta, again.delta)
    assert same(first.logits, again.logits)
    assert same(first.slm_adapter, again.slm_adapter)
    assert first.domain_adapter is not None
    assert again.domain_adapter is not None
    assert same(first.domain_adapter, again.domain_adapter)
    assert first.losses == again.losses
    assert first.logits_metadata == again.logits_metadata
    assert not same(first.delta, other_seed.delta)
    assert not same(first.delta, world.device(round_number=2).delta)


def test_nothing_of_the_domain_or_slm_adapter_is_in_what_leaves() -> None:
    """Every tensor and every number of the private adapters is looked for in the upload, whatever its name."""
    world = World("llama")  # the SLM has the proxy's shapes here, so that nothing is told apart by its shape
    result = world.device()
    assert result.domain_adapter is not None
    private = [*result.domain_adapter.values(), *result.slm_adapter.values()]
    uploaded = [*result.delta.values(), *result.logits.values()]
    assert not any("domain" in name or "slm" in name for name in [*result.delta, *result.logits])
    storages = {tensor.untyped_storage().data_ptr() for tensor in uploaded}
    assert not storages & {tensor.untyped_storage().data_ptr() for tensor in private}
    values = torch.cat([tensor.double().flatten() for tensor in uploaded]).unique()
    for tensor in private:
        trained = tensor.double().flatten()
        trained = trained[trained != 0]
        assert not torch.isin(trained, values).any()
    # Nor is the delta the change of another adapter: theta plus it gives exactly what the proxy holds as shared.
    assert result.delta.keys() == result.domain_adapter.keys()
    assert not any(
        torch.allclose(result.delta[name], result.domain_adapter[name]) for name in result.delta if "lora_B" in name
    )


def test_domain_tuning_moves_only_phi_and_mutual_learning_only_theta_and_psi() -> None:
    world = World()
    only_domain = world.device(settings=settings(domain_steps=4, training=TRAINING.model_copy(update={"steps": 1})))
    assert only_domain.domain_adapter is not None
    longer = world.device(settings=settings(domain_steps=4))
    assert longer.domain_adapter is not None
    assert same(only_domain.domain_adapter, longer.domain_adapter)  # SAML leaves phi alone
    assert any(bool(tensor.any()) for name, tensor in longer.domain_adapter.items() if "lora_B" in name)
    without = world.device(settings=settings(domain_steps=0))
    assert without.domain_adapter is not None
    assert not any(bool(tensor.any()) for name, tensor in without.domain_adapter.items() if "lora_B" in name)
    assert "domain_ce" not in without.losses


def test_the_logits_are_those_of_the_proxy_with_both_adapters() -> None:
    world = World()
    result = world.device()
    assert result.domain_adapter is not None
    trained = {name: world.theta[name] + result.delta[name] for name in world.theta}
    config = lora_config(world.proxy, **LORA.model_dump())
    with adapted(world.proxy, config, {"shared": trained, "domain": result.domain_adapter}) as lent:
        both, _ = probe_payload(lent, PROBE, top_k=8, temperature=1.0, max_length=64)
    with adapted(world.proxy, config, {"shared": trained}) as lent:
        without, _ = probe_payload(lent, PROBE, top_k=8, temperature=1.0, max_length=64)
    # The delta is rounded, so a class at the edge of the top eight may change.
    agree, differ = ((result.logits["ids"] == other["ids"]).all(1) for other in (both, without))
    assert agree.float().mean() > 0.9
    assert differ.float().mean() < 0.1


def test_state_goes_on_from_the_last_round() -> None:
    world = World()
    first = world.device()
    second = world.device(domain_adapter=first.domain_adapter, slm_adapter=first.slm_adapter, round_number=2)
    losses = [tuned_loss(world.slm, state, PRIVATE) for state in (first.slm_adapter, second.slm_adapter)]
    assert losses[1] < losses[0]
    assert second.domain_adapter is not None
    assert first.domain_adapter is not None
    assert not same(first.domain_adapter, second.domain_adapter)


def test_alpha_and_beta_weigh_what_each_side_learns() -> None:
    world = World()
    both = world.device()
    neither = world.device(settings=settings(alpha=0.0, beta=0.0))
    assert "slm_kl" not in neither.losses
    assert "proxy_kl" not in neither.losses
    assert not same(both.slm_adapter, neither.slm_adapter)
    assert not same(both.delta, neither.delta)
    one_way = world.device(settings=settings(alpha=0.0))
    assert same(one_way.slm_adapter, neither.slm_adapter)  # the SLM hears nothing
    assert same(one_way.delta, both.delta) is False  # but the proxy hears an SLM that learned otherwise


def test_without_distillation_the_slm_learns_as_if_alone() -> None:
    """With alpha 0 SAML is cross-entropy on the same rows in the same order: the standalone baseline, bit for bit."""
    world = World()
    together = world.device(settings=settings(alpha=0.0))
    assert same(tuned_alone(device_inputs(world.slm, PRIVATE), TRAINING), together.slm_adapter)


def test_public_rows_are_mixed_in() -> None:
    world = World()
    mixed = world.device(settings=settings(public_fraction=0.5))
    assert not same(mixed.delta, world.device().delta)
    assert mixed.num_examples == len(PRIVATE)


def test_a_pair_that_cannot_be_aligned_is_refused_before_any_training() -> None:
    world = World()
    calls: list[str] = []
    with pytest.raises(CoverageTooLow, match=r"alignment coverage: expected at least 0.900, got 0\.\d+") as refusal:
        world.device(
            private=[Example("long", "Say it.", "", "word " * 60)],
            settings=settings(min_coverage=0.9, training=TRAINING.model_copy(update={"max_length": 16})),
            on_progress=lambda stage, *_: calls.append(stage),
            slm=replace(world.slm, tokenizer=Shouting(world.slm.tokenizer)),
        )
    assert refusal.value.measure == "coverage"
    assert refusal.value.received < refusal.value.expected == 0.9
    assert calls == []
    assert not hasattr(world.proxy.model, "peft_config")


class Shouting:
    """A slow tokenizer that reads everything in capitals, and does not say what stands where."""

    is_fast = False

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, texts: Any, **options: Any) -> Any:
        loud = texts.upper() if isinstance(texts, str) else [text.upper() for text in texts]
        return self._tokenizer(loud, **options)


def test_alignment_is_measured_over_all_rows() -> None:
    slm, proxy = tiny_language_model("qwen2"), tiny_language_model("llama")
    rows = [EncodedRows(lm, [*PRIVATE, *PROBE], max_length=64) for lm in (slm, proxy)]
    shared = share_rows(rows[0], rows[1], [[0, 1, 2], [2, 3, 20]], min_coverage=0.8)
    assert shared.alignment == measure_alignment(rows[0], rows[1], shared.fold, [0, 1, 2, 3, 20])
    with pytest.raises(CoverageTooLow):
        share_rows(rows[0], rows[1], [[0]], min_coverage=1.01)


def test_cancelling_gives_everything_back() -> None:
    class Cancelled(Exception):
        pass

    def stop(stage: str, step: int, steps: int, losses: dict[str, float]) -> None:
        if (stage, step) == ("mutual_learning", 2):
            raise Cancelled

    world = World()
    with pytest.raises(Cancelled):
        world.device(on_progress=stop)
    assert not hasattr(world.slm.model, "peft_config")
    assert not hasattr(world.proxy.model, "peft_config")
    assert same(world.device().delta, World().device().delta)


def test_an_adapter_of_other_settings_is_refused() -> None:
    world = World()
    other = fresh_adapter(world.proxy, lora_config(world.proxy, rank=3, alpha=4.0), seed=1)
    with pytest.raises(AdapterMismatch, match=r"shape of .*: expected \[2, 32\], got \[3, 32\]"):
        world.device(shared_adapter=other)


def test_standalone_learns_alone_and_sends_nothing() -> None:
    slm = tiny_language_model("bloom")
    steps = steps_of(StandaloneSettings(slm_lora=LORA, training=TRAINING))
    stages: list[str] = []
    first = steps.device_step(device_inputs(slm, PRIVATE, on_progress=lambda stage, *_: stages.append(stage)))
    assert stages == ["standalone_tuning"] * 6
    assert (first.delta, first.logits, first.logits_metadata, first.domain_adapter) == ({}, {}, {}, None)
    assert set(first.losses) == {"slm_ce"}
    second = steps.device_step(device_inputs(slm, PRIVATE, slm_adapter=first.slm_adapter, round_number=2))
    scores = [tuned_loss(slm, state, PRIVATE) for state in (first.slm_adapter, second.slm_adapter)]
    assert scores[1] < scores[0] < bits_per_byte(slm, PRIVATE)


def test_the_server_teaches_both_and_gives_equal_bits() -> None:
    world = World()
    stages: list[str] = []
    first = world.server(on_progress=lambda stage, *_: stages.append(stage))
    assert stages == ["server_mutual_learning"] * 5
    assert set(first.losses) == {"llm_ce", "llm_kl", "proxy_ce", "proxy_kl"}
    assert first.alignment is not None
    assert (first.alignment.coverage, first.alignment.class_agreement) == (1.0, 1.0)
    assert not same(first.shared_adapter, world.theta)
    again = World().server()
    assert same(first.shared_adapter, again.shared_adapter)
    assert same(first.llm_adapter, again.llm_adapter)
    assert tuned_loss(world.llm, first.llm_adapter, PUBLIC) < bits_per_byte(world.llm, PUBLIC)
    onward = world.server(llm_adapter=first.llm_adapter, shared_adapter=first.shared_adapter, round_number=2)
    assert tuned_loss(world.llm, onward.llm_adapter, PUBLIC) < tuned_loss(world.llm, first.llm_adapter, PUBLIC)


def test_micro_batches_change_every_stage_by_rounding_only() -> None:
    world = World()
    small = settings(
        training=TRAINING.model_copy(update={"micro_batch_size": 3}),
        server=ServerTraining(steps=5, batch_size=4, micro_batch_size=3, max_length=64, llm_learning_rate=1e-2),
    )
    whole_device, device = world.device(), world.device(settings=small)
    whole_cloud, cloud = world.server(), world.server(settings=small)
    for expected, got in ((whole_device.losses, device.losses), (whole_cloud.losses, cloud.losses)):
        assert got == pytest.approx(expected, rel=1e-3)
    assert whole_device.domain_adapter is not None
    assert device.domain_adapter is not None
    for whole, cut in (
        (whole_device.domain_adapter, device.domain_adapter),
        (whole_device.slm_adapter, device.slm_adapter),
        (whole_device.delta, device.delta),
        (whole_cloud.shared_adapter, cloud.shared_adapter),
        (whole_cloud.llm_adapter, cloud.llm_adapter),
    ):
        assert not same(whole, cut)  # summed in another order: it was cut
        for name, tensor in whole.items():
            torch.testing.assert_close(cut[name], tensor, rtol=1e-2, atol=1e-3)


def test_a_standalone_device_takes_micro_batches() -> None:
    losses = []
    for size in (None, 3):
        training = TRAINING.model_copy(update={"micro_batch_size": size})
        steps = steps_of(StandaloneSettings(slm_lora=LORA, training=training))
        losses.append(steps.device_step(device_inputs(tiny_language_model("gpt2"), PRIVATE)).losses["slm_ce"])
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_no_server_steps_change_nothing() -> None:
    world = World()
    result = world.server(settings=settings(server=ServerTraining(steps=0)))
    assert same(result.shared_adapter, world.theta)
    assert result.losses == {}
    assert result.alignment is None
    fresh = fresh_adapter(world.llm, lora_config(world.llm, **LORA.model_dump()), seed=0)
    assert result.llm_adapter.keys() == fresh.keys()


@pytest.mark.parametrize("mode", ["least_ce", "ce_weighted"])
def test_devices_logits_teach_where_they_are_better(mode: Any) -> None:
    world = World()
    server = ServerTraining(steps=5, batch_size=4, max_length=64, device_teacher=mode, probe_fraction=0.5)
    # A device that learned the probe rows' kind for long beats the untrained proxy on them.
    skilled = world.device(private=tiny_examples(16, start=200), settings=settings(domain_steps=40))
    payloads = [world.parse(world.device()), world.parse(skilled)]
    taught = world.server(device_logits=payloads, settings=settings(server=server))
    assert taught.teacher is not None
    assert taught.teacher.num_probe_rows == len(PROBE)
    assert taught.teacher.proxy_rows[1] == taught.teacher.llm_rows[1] == len(PROBE)
    assert {"proxy_teacher_kl", "llm_teacher_kl"} <= set(taught.losses)
    assert not same(taught.shared_adapter, world.server().shared_adapter)
    off = settings(server=server.model_copy(update={"device_teacher": "off"}))
    untaught = world.server(device_logits=payloads, settings=off)
    assert untaught.teacher is not None
    assert untaught.teacher.proxy_rows == [0, 0]
    assert same(untaught.shared_adapter, world.server(settings=off).shared_adapter)


def test_devices_that_are_worse_teach_nobody() -> None:
    world = World()
    payload = world.parse(world.device())
    # All its mass on one class that is hardly ever the next token, whatever it may claim of itself.
    never = replace(payload, ids_SK=torch.arange(payload.ids_SK.shape[1]).expand_as(payload.ids_SK))
    clueless = replace(never, tail_S=torch.full_like(payload.tail_S, 1e-7))
    result = world.server(device_logits=[clueless])
    assert result.teacher is not None
    assert (result.teacher.proxy_rows, result.teacher.llm_rows) == ([0], [0])
    assert same(result.shared_adapter, world.server().shared_adapter)


def test_an_llm_with_another_tokenizer_is_taught_through_the_proxy_only() -> None:
    world = World()
    payload = world.parse(world.device(settings=settings(domain_steps=40)))
    other = tiny_language_model("qwen2")
    result = world.server(llm=other, device_logits=[payload])
    assert result.teacher is not None
    assert result.teacher.llm_rows == [0]
    assert result.teacher.proxy_rows[0] > 0
    assert "llm_teacher_kl" not in result.losses
    assert result.losses["llm_kl"] > 0


def test_two_whole_rounds_and_a_zero_delta_changes_nothing() -> None:
    world = World()
    devices = [World("gpt2"), World("bloom")]
    theta, states, omega = world.theta, [(None, None)] * 2, None
    for round_number in (1, 2):
        mean = StreamingMean(theta)
        payloads = []
        for place, device in enumerate(devices):
            domain, slm = states[place]
            result = device.device(
                shared_adapter=theta, domain_adapter=domain, slm_adapter=slm, round_number=round_number, seed=place
            )
            mean.add(result.delta, result.num_examples)
            payloads.append(world.parse(result))
            states[place] = (result.domain_adapter, result.slm_adapter)  # type: ignore[assignment]
        averaged = apply_server_update(theta, mean.result(), 1.0)
        served = world.server(
            shared_adapter=averaged, llm_adapter=omega, device_logits=payloads, round_number=round_number
        )
        theta, omega = served.shared_adapter, served.llm_adapter
    assert tuned_loss(world.llm, omega or {}, PUBLIC) < bits_per_byte(world.llm, PUBLIC)
    zero = {name: torch.zeros_like(tensor) for name, tensor in theta.items()}
    assert same(apply_server_update(theta, zero, 1.0), theta)
    config = lora_config(world.proxy, **LORA.model_dump())
    with adapted(world.proxy, config, {"shared": theta}) as lent:
        assert same(adapter_state(lent, "shared"), theta)


def test_how_values_travel_is_the_settings_choice() -> None:
    world = World()
    result = world.device(settings=settings(logits_values="float16"))
    assert result.logits_metadata["values"] == "float16"
    assert result.logits["values"].dtype == torch.float16
    assert world.device().logits_metadata["values"] == "int7"
