from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from assets.checkpoints import FolderCheckpoints
from cotuning.encoding import encode_batch
from cotuning.examples import render_prompt
from cotuning.folding import fold_pair
from cotuning.language_model import LanguageModel, hidden_states, output_head
from cotuning.proxy import distil_proxy, measure_agreement
from cotuning.proxy_creation import create_proxy
from tests.tiny_models import NAMES, tiny_examples, tiny_language_model

PUBLIC = tiny_examples(24, start=300)


def silent(stage: str, step: int, steps: int, losses: dict[str, float]) -> None:
    pass


def distil(llm: LanguageModel, proxy: LanguageModel, **changes: Any) -> dict[str, float]:
    options: dict[str, Any] = {
        "steps": 40,
        "batch_size": 8,
        "learning_rate": 5e-3,
        "distillation_weight": 1.0,
        "temperature": 1.0,
        "max_length": 64,
        "seed": 0,
        "on_progress": silent,
    }
    return distil_proxy(llm, proxy, PUBLIC, **options | changes)


def opinionated(name: str = "llama") -> LanguageModel:
    """Larger weights: a teacher whose distributions are far from uniform."""
    lm = tiny_language_model(name)
    for tensor in lm.model.parameters():
        if tensor.dim() > 1:
            tensor.mul_(12)
    return lm


@pytest.mark.parametrize("name", NAMES)
def test_keeping_every_layer_keeps_the_model(name: str) -> None:
    llm = tiny_language_model(name)
    total = llm.model.config.num_hidden_layers
    proxy = create_proxy(llm, source="prune", layers=total, seed=0)
    ids_BT = torch.tensor([[1, 5, 9, 4]])
    with torch.no_grad():
        torch.testing.assert_close(proxy.model(input_ids=ids_BT).logits, llm.model(input_ids=ids_BT).logits)


@pytest.mark.parametrize("name", NAMES)
def test_pruning_keeps_embeddings_and_spread_layers(name: str) -> None:
    llm = tiny_language_model(name)
    proxy = create_proxy(llm, source="prune", layers=1, seed=0)
    assert proxy.model.config.num_hidden_layers == 1
    assert torch.equal(proxy.model.get_input_embeddings().weight, llm.model.get_input_embeddings().weight)
    assert proxy.num_parameters < llm.num_parameters
    assert proxy.table is llm.table
    output_head(proxy)
    with torch.no_grad():
        hidden_states(proxy, torch.tensor([[1, 2, 3]]))


def test_first_and_last_layer_are_always_kept() -> None:
    llm = tiny_language_model("llama")  # three layers
    proxy = create_proxy(llm, source="prune", layers=2, seed=0)
    kept = [layer.mlp.up_proj.weight for layer in proxy.model.model.layers]
    own = [layer.mlp.up_proj.weight for layer in llm.model.model.layers]
    assert torch.equal(kept[0], own[0])
    assert torch.equal(kept[1], own[2])
    assert [layer.self_attn.layer_idx for layer in proxy.model.model.layers] == [0, 1]


def test_lists_with_one_entry_a_layer_are_cut_alike() -> None:
    llm = tiny_language_model("qwen2")
    assert len(llm.model.config.layer_types) == 2
    proxy = create_proxy(llm, source="prune", layers=1, seed=0)
    assert len(proxy.model.config.layer_types) == 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [None, 12])
def test_a_fresh_proxy_is_narrower_of_the_same_family_and_follows_from_the_seed(name: str, width: int | None) -> None:
    llm = tiny_language_model(name)
    proxy = create_proxy(llm, source="config", layers=1, hidden_size=width, seed=4)
    config = proxy.model.config
    assert (config.hidden_size, config.num_hidden_layers) == (width or 8, 1)
    assert config.model_type == llm.architecture
    assert proxy.num_parameters < llm.num_parameters
    output_head(proxy)
    again = create_proxy(llm, source="config", layers=1, hidden_size=width, seed=4)
    other = create_proxy(llm, source="config", layers=1, hidden_size=width, seed=5)
    same = [torch.equal(a, b) for a, b in zip(proxy.model.parameters(), again.model.parameters(), strict=True)]
    assert all(same)
    assert not torch.equal(proxy.model.get_input_embeddings().weight, other.model.get_input_embeddings().weight)


def test_impossible_requests_are_refused() -> None:
    llm = tiny_language_model("llama")
    with pytest.raises(ValueError, match="expected 1 to 3 layers, the LLM has no more; got 4"):
        create_proxy(llm, source="prune", layers=4, seed=0)
    with pytest.raises(ValueError, match="no hidden_size for source 'prune'"):
        create_proxy(llm, source="prune", layers=1, hidden_size=8, seed=0)
    with pytest.raises(ValueError, match="expected source 'prune' or 'config'"):
        create_proxy(llm, source="grow", layers=1, seed=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected at least one public row"):
        distil_proxy(
            llm,
            llm,
            [],
            steps=1,
            batch_size=1,
            learning_rate=1.0,
            distillation_weight=1.0,
            temperature=1.0,
            max_length=32,
            seed=0,
            on_progress=silent,
        )


def test_a_model_agrees_with_itself_and_kl_equals_the_plain_formula() -> None:
    llm, other = opinionated(), tiny_language_model("llama", seed=5)
    fold = fold_pair(llm.tokenizer, llm.table, llm.tokenizer, llm.table)
    same = measure_agreement(llm, llm, PUBLIC[:4], fold=fold, max_length=64)
    assert (same.kl, same.top1) == (pytest.approx(0.0, abs=1e-6), 1.0)
    assert same.llm_ce == same.proxy_ce

    result = measure_agreement(llm, other, PUBLIC[:4], fold=fold, max_length=64)
    total = count = 0.0
    for row in PUBLIC[:4]:
        prompt = render_prompt(llm.tokenizer, row)
        batch = encode_batch(llm.tokenizer, llm.table, [prompt], [row.output], max_length=64)
        with torch.no_grad():
            p_TV = llm.model(input_ids=batch.input_ids_BT).logits[0].log_softmax(-1)
            q_TV = other.model(input_ids=batch.input_ids_BT).logits[0].log_softmax(-1)
        taught_T = batch.labels_BT[0, 1:] >= 0
        total += float((p_TV.exp() * (p_TV - q_TV)).sum(-1)[:-1][taught_T].sum())
        count += float(taught_T.sum())
    assert result.kl == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize("source", ["prune", "config"])
def test_distillation_brings_the_proxy_closer(source: Any) -> None:
    llm = opinionated()
    before = {name: tensor.clone() for name, tensor in llm.model.state_dict().items()}
    proxy = create_proxy(llm, source=source, layers=1, seed=1)
    metrics = distil(llm, proxy)
    assert metrics["kl_after"] < 0.8 * metrics["kl_before"]
    assert metrics["top1_after"] >= metrics["top1_before"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in llm.model.state_dict().items())
    assert not any(tensor.requires_grad for tensor in proxy.model.parameters())


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_other_divergences_do_too(divergence: Any) -> None:
    llm = opinionated()
    proxy = create_proxy(llm, source="prune", layers=2, seed=1)
    metrics = distil(llm, proxy, divergence=divergence, temperature=2.0)
    assert metrics["divergence"] >= 0
    assert metrics["kl_after"] < metrics["kl_before"]


def test_lambda_weighs_text_against_teacher() -> None:
    llm = opinionated()
    results = {}
    for weight in (0.0, 0.5, 1.0):
        proxy = create_proxy(llm, source="prune", layers=1, seed=1)
        results[weight] = distil(llm, proxy, distillation_weight=weight)
    assert results[0.0]["divergence"] == 0  # switched off, not computed
    assert results[0.0]["ce"] < results[0.5]["ce"] < results[1.0]["ce"]
    assert results[1.0]["kl_after"] < results[0.5]["kl_after"] < results[0.0]["kl_after"]


def test_a_proxy_with_another_tokenizer_learns_too() -> None:
    """Source `pretrained`: any small model, its vocabulary folded onto the LLM's."""
    llm, proxy = opinionated(), tiny_language_model("qwen2")
    metrics = distil(llm, proxy)
    assert metrics["kl_after"] < metrics["kl_before"]


def test_equal_arguments_give_equal_bits_and_no_steps_only_measure() -> None:
    llm = opinionated()
    proxies = [create_proxy(llm, source="prune", layers=1, seed=1) for _ in range(2)]
    assert distil(llm, proxies[0], steps=5) == distil(llm, proxies[1], steps=5)
    pairs = zip(proxies[0].model.parameters(), proxies[1].model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    metrics = distil(llm, proxies[0], steps=0)
    assert metrics["kl_before"] == metrics["kl_after"]
    assert "ce" not in metrics


def test_one_row_is_enough() -> None:
    llm = opinionated()
    proxy = create_proxy(llm, source="prune", layers=1, seed=1)
    metrics = distil_proxy(
        llm,
        proxy,
        PUBLIC[:1],
        steps=2,
        batch_size=4,
        learning_rate=1e-3,
        distillation_weight=0.5,
        temperature=1.0,
        max_length=64,
        seed=0,
        on_progress=silent,
    )
    assert metrics["kl_before"] > 0


@pytest.mark.parametrize("change", [{"feature_weight": 1.0}, {"relation_weight": 5.0}, {"on_policy_fraction": 1.0}])
@pytest.mark.parametrize("student", ["llama", "opt"])
def test_every_mode_brings_the_proxy_closer_and_reports_its_term(student: str, change: dict[str, float]) -> None:
    """The OPT student has another tokenizer and a narrower last hidden state."""
    llm = opinionated()
    pruned = create_proxy(llm, source="prune", layers=2, seed=1)
    proxy = pruned if student == "llama" else tiny_language_model("opt")
    metrics = distil(llm, proxy, on_policy_tokens=12, **change)
    assert metrics["kl_after"] < metrics["kl_before"]
    assert {"top1_before", "top1_after"} <= metrics.keys()
    names = {"feature_weight": "feature", "relation_weight": "relation", "on_policy_fraction": "on_policy_divergence"}
    term = names[next(iter(change))]
    assert metrics[term] > 0
    assert metrics.keys() & set(names.values()) == {term}
    assert not any(tensor.requires_grad for tensor in proxy.model.parameters())


def test_terms_on_hidden_states_fall_when_they_are_trained() -> None:
    llm = opinionated()
    results: dict[float, dict[str, float]] = {}
    for weight in (1e-9, 3.0):
        proxy = create_proxy(llm, source="config", layers=2, seed=1)
        results[weight] = distil(llm, proxy, feature_weight=weight, relation_weight=weight)
    assert results[3.0]["feature"] < 0.9 * results[1e-9]["feature"]
    assert results[3.0]["relation"] < 0.9 * results[1e-9]["relation"]


def test_the_maps_are_no_part_of_the_proxy() -> None:
    llm = opinionated()
    proxies = [create_proxy(llm, source="config", layers=1, seed=1) for _ in range(2)]
    distil(llm, proxies[0], steps=2)
    distil(llm, proxies[1], steps=2, feature_weight=1.0)
    assert proxies[0].model.state_dict().keys() == proxies[1].model.state_dict().keys()
    assert proxies[0].num_parameters == proxies[1].num_parameters


def test_on_policy_steps_read_the_proxys_own_words_and_have_no_cross_entropy() -> None:
    llm = opinionated()
    reported: list[set[str]] = []

    def note(stage: str, step: int, steps: int, losses: dict[str, float]) -> None:
        if stage == "distillation":
            reported.append(set(losses))

    proxy = create_proxy(llm, source="prune", layers=1, seed=1)
    distil(llm, proxy, on_policy_fraction=0.5, on_policy_tokens=8, on_progress=note)
    own = reported.count({"on_policy_divergence"})
    assert own + reported.count({"ce", "divergence"}) == 40
    assert 10 < own < 30


def test_on_policy_needs_nothing_of_the_rows_answers() -> None:
    llm = opinionated()
    results = []
    for answer in ("one thing", "quite another"):
        proxy = create_proxy(llm, source="prune", layers=1, seed=1)
        # Of one length, so that the order of the rows is the same.
        rows = [replace(row, output=answer.ljust(20, ".")) for row in tiny_examples(8)]
        distil_proxy(
            llm,
            proxy,
            rows,
            steps=3,
            batch_size=4,
            learning_rate=1e-2,
            distillation_weight=0.7,
            temperature=1.0,
            on_policy_fraction=1.0,
            on_policy_tokens=8,
            max_length=64,
            seed=0,
            on_progress=silent,
        )
        results.append(torch.cat([tensor.flatten() for tensor in proxy.model.parameters()]))
    assert torch.equal(results[0], results[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feature_weight": -1.0}, "expected feature_weight of at least 0, got -1.0"),
        ({"relation_weight": -0.5}, "expected relation_weight of at least 0, got -0.5"),
        ({"on_policy_fraction": 1.5}, "expected on_policy_fraction from 0 to 1, got 1.5"),
        ({"on_policy_fraction": 0.5, "distillation_weight": 0.0}, "expected a weight above 0 for the teacher's part"),
    ],
)
def test_impossible_modes_are_refused(change: dict[str, float], message: str) -> None:
    llm = opinionated()
    with pytest.raises(ValueError, match=message):
        distil(llm, create_proxy(llm, source="prune", layers=1, seed=1), **change)


def test_a_killed_distillation_goes_on_to_the_same_bits_in_every_mode(tmp_path: Path) -> None:
    """With samples of the proxy and learned maps: both follow from the checkpoint."""
    llm = opinionated()
    options: dict[str, Any] = {
        "steps": 9,
        "on_policy_fraction": 0.5,
        "on_policy_tokens": 8,
        "feature_weight": 1.0,
        "relation_weight": 1.0,
    }

    class Killed(Exception):
        pass

    def kill(stage: str, step: int, steps: int, losses: dict[str, float]) -> None:
        if (stage, step) == ("distillation", 5):
            raise Killed

    def fresh() -> LanguageModel:
        return create_proxy(llm, source="prune", layers=1, seed=1)

    checkpoints = FolderCheckpoints(tmp_path, configuration="one", every=2, on_ignored=pytest.fail)
    whole, resumed = fresh(), fresh()
    whole_metrics = distil(llm, whole, **options)
    with pytest.raises(Killed):
        distil(llm, fresh(), checkpoints=checkpoints, on_progress=kill, **options)
    assert distil(llm, resumed, checkpoints=checkpoints, **options) == whole_metrics
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_gradient_checkpointing_changes_no_bit() -> None:
    llm = opinionated()
    proxies = [create_proxy(llm, source="prune", layers=2, seed=1) for _ in range(2)]
    plain = distil(llm, proxies[0], steps=4, feature_weight=1.0)
    assert distil(llm, proxies[1], steps=4, feature_weight=1.0, gradient_checkpointing=True) == plain
    pairs = zip(proxies[0].model.parameters(), proxies[1].model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_measuring_can_be_ended_between_rows() -> None:
    llm = opinionated()

    class Stopped(Exception):
        pass

    def stop(stage: str, step: int, steps: int, losses: dict[str, float]) -> None:
        told.append((stage, step, steps))
        raise Stopped

    told: list[tuple[str, int, int]] = []
    with pytest.raises(Stopped):
        distil(llm, create_proxy(llm, source="prune", layers=1, seed=1), on_progress=stop)
    ((stage, done, rows),) = told
    assert (stage, done) == ("distillation_agreement", rows)
