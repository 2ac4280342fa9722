"""Mutual learning: a step against two bare training steps, memory of the losses, and equality with PyTorch's KL.

`make bench-saml`. Models are random and small, text and tokenizers those of `corpus`. Memory is the greatest resident
size of a child process that makes inputs and runs one loss forward and backward, minus that of one that makes the same
inputs only. TRL's loss comes from the `bench` extra; without it that line says so and is left out.
"""

import argparse
import importlib
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.corpus import held_out, tokenizer
from benchmarks.measuring import Goal, compare, peak_memory_of, print_goals, print_table, write_results
from cotuning.alignment import align
from cotuning.cross_entropy import cross_entropy, response_tokens
from cotuning.encoding import EncodedBatch, encode_batch
from cotuning.folding import FoldPair, fold_pair
from cotuning.heads import Head
from cotuning.mutual_loss import mutual_loss
from cotuning.token_tables import TokenTable, token_table

_ROWS, _LENGTH = 4, 512
_STEP_LENGTH = 256
_KINDS = ("bpe_single_digits", "bpe_whole_numbers")
_SMALL = ((256, 6), (384, 6))
_TINY = ((192, 4), (256, 4))
_WIDE_VOCABULARY = 32_000
_LOSS_WIDTHS = (576, 1024)


def model_of(num_tokens: int, hidden_size: int, layers: int) -> LlamaForCausalLM:
    """A random Llama with untied head, all of it trained."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=num_tokens,
            hidden_size=hidden_size,
            intermediate_size=3 * hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=8,
            max_position_embeddings=_STEP_LENGTH,
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def encoded() -> tuple[list[EncodedBatch], list[TokenTable], FoldPair]:
    """Both readings of the same passages, cut at `_STEP_LENGTH` tokens a row."""
    tokenizers = [tokenizer(kind) for kind in _KINDS]
    tables = [token_table(each) for each in tokenizers]
    prompts = ["Continue:\n"] * _ROWS
    batches = [
        encode_batch(each, table, prompts, held_out(_ROWS), max_length=_STEP_LENGTH)
        for each, table in zip(tokenizers, tables, strict=True)
    ]
    return batches, tables, fold_pair(tokenizers[0], tables[0], tokenizers[1], tables[1])


def widened(batches: list[EncodedBatch], tables: list[TokenTable], fold: FoldPair) -> FoldPair:
    """The same spans over vocabularies of `_WIDE_VOCABULARY`: ids never seen are spread evenly over the classes."""
    maps = []
    for table, map_V in zip(tables, (fold.map_a_V, fold.map_b_V), strict=True):
        extra = torch.arange(_WIDE_VOCABULARY - table.num_tokens) % fold.num_classes
        maps.append(torch.cat([map_V, extra]))
    return FoldPair(maps[0], maps[1], fold.num_classes, fold.end_class, fold.other_class, 0, False, "widened")


def bare_step(models: list[LlamaForCausalLM], batches: list[EncodedBatch]) -> None:
    """Each model's forward, its own cross-entropy, backward; as a trainer runs it."""
    for model, batch in zip(models, batches, strict=True):
        model.zero_grad()
        model(input_ids=batch.input_ids_BT, labels=batch.labels_BT).loss.backward()


def saml_step(models: list[LlamaForCausalLM], batches: list[EncodedBatch], fold: FoldPair) -> None:
    """Alignment, both forwards, both cross-entropies, both directions of the folded loss, backward."""
    spans = align(*batches)
    losses, states, heads = [], [], []
    rows = (spans.row_a_S, spans.row_b_S)
    for model, batch, row_S in zip(models, batches, rows, strict=True):
        model.zero_grad()
        hidden_BTD = model.model(input_ids=batch.input_ids_BT).last_hidden_state
        head = Head(model.lm_head.weight, model.lm_head.out_features)
        tokens = response_tokens(batch)
        losses.append(cross_entropy(hidden_BTD[tokens.sample_N, tokens.position_N], head, tokens.target_N)[0])
        states.append(hidden_BTD[spans.sample_S, row_S])
        heads.append(head)
    distances = mutual_loss(states[0], heads[0], states[1], heads[1], fold, after_break_S=fold.after_break(spans))
    torch.stack([*losses, *distances]).sum().backward()


def steps(repeats: int) -> tuple[dict[str, Any], list[Goal]]:
    """A step of mutual learning over two bare ones: vocabularies of 8k and 4k, and of 32k both."""
    batches, tables, fold = encoded()
    settings = (
        ("V = 8k and 4k", [table.num_tokens for table in tables], fold, _SMALL, 1.15),
        ("V = 32k", [_WIDE_VOCABULARY] * 2, widened(batches, tables, fold), _TINY, 1.4),
    )
    results: dict[str, Any] = {"tokens": [int(batch.attention_mask_BT.sum()) for batch in batches]}
    goals = []
    for name, sizes, each_fold, shapes, limit in settings:
        models = [model_of(size, *shape) for size, shape in zip(sizes, shapes, strict=True)]
        timings = compare(
            {"bare": partial(bare_step, models, batches), "saml": partial(saml_step, models, batches, each_fold)},
            repeats,
        )
        ratio = timings["saml"].time_ratio
        results[name] = {
            "parameters": [sum(weight.numel() for weight in model.parameters()) for model in models],
            "bare_seconds": timings["bare"].seconds,
            "saml_seconds": timings["saml"].seconds,
            "time_ratio": ratio,
        }
        goals.append(Goal(f"SAML step over two bare steps, {name}", ratio, limit, at_least=False))
    return results, goals


def loss_in_child(kind: str) -> None:
    """Make the inputs of a loss and, unless `kind` starts with `inputs`, run it; for `peak_memory_of`."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows, size = _ROWS * _LENGTH, _WIDE_VOCABULARY
    if kind in {"inputs_logits", "trl_one_way"}:
        student_BTV, teacher_BTV = torch.randn(2, _ROWS, _LENGTH, size).unbind()
        if kind == "trl_one_way":
            loss = _trl_loss()
            assert loss is not None
            loss(student_BTV.requires_grad_(), teacher_BTV, beta=0).backward()
        return
    hidden = [torch.randn(rows, width).requires_grad_() for width in _LOSS_WIDTHS]
    frozen = kind in {"inputs_frozen", "one_way"}
    weights = [torch.randn(size, width).mul_(width**-0.5).requires_grad_(not frozen) for width in _LOSS_WIDTHS]
    if kind.startswith("inputs"):
        return
    ids = torch.arange(size)
    heads = [Head(weight, size) for weight in weights]
    if kind == "naive_two_way":
        sum(_naive(hidden, weights)).backward()
    elif kind == "one_way":
        same = FoldPair(ids, ids, size, 0, 0, size, True, "same")
        mutual_loss(hidden[0], heads[0], hidden[1].detach(), heads[1], same, weight_b=None)[0].backward()
    else:
        folded = FoldPair(ids % 20_000, ids % 19_999 + ids // 31_999, 20_000, 0, 1, 0, False, "folded")
        same = FoldPair(ids, ids, size, 0, 0, size, True, "same")
        pair = {"two_way": same, "two_way_folded": folded}[kind]
        sum(mutual_loss(hidden[0], heads[0], hidden[1], heads[1], pair)).backward()


def _naive(hidden: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    """Both directions over the whole vocabulary by PyTorch's own functions."""
    logs = [(states @ weight.T).log_softmax(-1) for states, weight in zip(hidden, weights, strict=True)]
    kl = partial(functional.kl_div, reduction="batchmean", log_target=True)
    return [kl(logs[0], logs[1].detach()), kl(logs[1], logs[0].detach())]


def _trl_loss() -> Callable[..., Tensor] | None:
    """TRL's generalised JSD (GKD), None where TRL is not installed."""
    if find_spec("trl") is None:
        return None
    trainer = importlib.import_module("trl.experimental.gkd.gkd_trainer").GKDTrainer
    loss: Callable[..., Tensor] = trainer.generalized_jsd_loss
    return loss


def memory() -> tuple[dict[str, Any], list[Goal]]:
    """Extra peak bytes of the losses, each over that of its inputs."""

    def extra(kind: str, inputs: str) -> int:
        return max(peak("benchmarks.saml:loss_in_child", kind) - peak("benchmarks.saml:loss_in_child", inputs), 1)

    def peak(function: str, kind: str) -> int:
        return peak_memory_of(function, kind=kind).extra_bytes

    found = {kind: extra(kind, "inputs") for kind in ("naive_two_way", "two_way", "two_way_folded")}
    ratio = found["two_way_folded"] / found["naive_two_way"]
    goals = [Goal("two-way folded loss, extra peak over naive full vocabulary", ratio, 0.45, at_least=False)]
    found["one_way"] = extra("one_way", "inputs_frozen")
    if _trl_loss() is None:
        print("trl cannot be imported (pip install 'cotune[bench]'): no comparison with its JSD")
    else:
        found["trl_one_way"] = extra("trl_one_way", "inputs_logits")
        ratio = found["one_way"] / found["trl_one_way"]
        goals.append(Goal("one-way loss, extra peak over TRL's JSD at beta 0", ratio, 0.25, at_least=False))
    return {f"{kind}_extra_bytes": value for kind, value in found.items()}, goals


def equality() -> tuple[dict[str, Any], list[Goal]]:
    """Greatest difference from `F.kl_div` in loss and gradients, equal tokenizers, float64."""
    generator = torch.Generator().manual_seed(0)
    size, rows = 1000, 64
    hidden, weight, other, other_weight = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((rows, 32), (size, 32), (rows, 48), (size, 48))
    )
    ids = torch.arange(size)
    greatest = 0.0
    for identical in (True, False):
        fold = FoldPair(ids, ids, size, 0, 0, size, identical, "same")
        own, plain = ([tensor.clone().requires_grad_() for tensor in (hidden, weight)] for _ in range(2))
        loss, _ = mutual_loss(own[0], Head(own[1], size), other, Head(other_weight, size), fold, chunk_rows=10)
        loss.backward()
        expected = _naive([plain[0], other], [plain[1], other_weight])[0]
        expected.backward()
        pairs = [(loss, expected), (own[0].grad, plain[0].grad), (own[1].grad, plain[1].grad)]
        greatest = max(greatest, *(float((ours - theirs).detach().abs().max()) for ours, theirs in pairs))
    return {"greatest_difference": greatest}, [
        Goal("difference from F.kl_div, float64", greatest, 1e-12, at_least=False, unit="")
    ]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=4, help="timed turns of each comparison")
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    parts = {"steps": steps(repeats), "memory": memory(), "equality": equality()}
    goals = [goal for _, found in parts.values() for goal in found]
    print_table("Extra peak memory", ("loss", "MiB"), [(k, v / 2**20) for k, v in parts["memory"][0].items()])
    print_goals("Mutual learning", goals)
    write_results(
        "saml",
        {name: results for name, (results, _) in parts.items()}
        | {"goals": [{"measure": goal.measure, "value": goal.value, "met": goal.met} for goal in goals]},
    )


if __name__ == "__main__":
    main()
