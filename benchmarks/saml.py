"""Mutual learning: a step against two bare training steps, memory of the losses, and equality with PyTorch's KL.

`make bench-saml`. Models are random (`pairs`), text and tokenizers those of `corpus`. Steps are timed in seconds of the
processor, by one thread. Memory is the greatest resident size of a child process that makes inputs and runs one loss
forward and backward, minus that of one that makes the same inputs only. TRL's loss comes from the `bench` extra;
without it that line says so and is left out.
"""

import argparse
import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.measuring import Goal, compare, peak_memory_of, print_goals, print_table, write_results
from benchmarks.pairs import Reader, Shape, bare_step, described, fold_matching, reader, saml_step
from cotuning.cross_entropy import cross_entropy, response_tokens
from cotuning.folding import FoldPair
from cotuning.heads import Head
from cotuning.joint_loss import JointSide, joint_loss
from cotuning.matching.interface import Matching
from cotuning.mutual_loss import mutual_loss

_ROWS, _LENGTH = 4, 512
_KINDS = ("bpe_single_digits", "bpe_whole_numbers")
_WIDE_VOCABULARY = 32_000
_LOSS_WIDTHS = (576, 1024)


@dataclass(frozen=True)
class Setting:
    """Two models whose steps are timed.

    Attributes:
        vocabularies: of each, the tokenizer's own where None.
        limit: greatest ratio aimed at.
        lora_rank: of adapters on frozen models; all weights are trained if not given.
        apart: whether the step with cross-entropies apart is timed too.
    """

    name: str
    shapes: tuple[Shape, Shape]
    vocabularies: tuple[int | None, int | None]
    limit: float
    rows: int = 4
    length: int = 256
    lora_rank: int | None = None
    apart: bool = True


_SMALL = (
    Setting("V = 8k and 4k", (Shape(256, 6, 8, 8, 768), Shape(384, 6, 8, 8, 1152)), (None, None), 1.15),
    Setting("V = 32k", (Shape(192, 4, 8, 8, 576), Shape(256, 4, 8, 8, 768)), (_WIDE_VOCABULARY,) * 2, 1.4),
)
# The second has the shape of Qwen2.5-0.5B, the first that of a Llama of 0.3 billion.
_LARGE = Setting(
    "0.3 B and 0.5 B, V = 32k and 152k",
    (Shape(1024, 24, 16, 8, 2816, tied=True), Shape(896, 24, 14, 2, 4864, tied=True)),
    (_WIDE_VOCABULARY, 151_936),
    1.10,
    rows=2,
    length=128,
    lora_rank=8,
    apart=False,
)


def apart_step(readers: Sequence[Reader], match: Matching) -> None:
    """As `saml_step`, but the cross-entropies in passes of their own: what one pass through each head saves."""
    for each in readers:
        each.forget_gradients()
    losses = []
    readings = [replace(each.reading(), joint_weight=None) for each in readers]
    for reading, lesson in zip(readings, match(*readings), strict=True):
        tokens = response_tokens(reading.batch)
        hidden_ND = reading.hidden_BTD[tokens.sample_N, tokens.position_N]
        losses += [cross_entropy(hidden_ND, reading.head, tokens.target_N)[0], lesson.terms["kl"]]
    torch.stack(losses).sum().backward()


def step_ratios(setting: Setting, repeats: int) -> tuple[dict[str, Any], Goal]:
    """A step of mutual learning over two bare ones, in processor time."""
    readers = [
        reader(kind, shape, size, rows=setting.rows, length=setting.length, lora_rank=setting.lora_rank)
        for kind, shape, size in zip(_KINDS, setting.shapes, setting.vocabularies, strict=True)
    ]
    match = fold_matching(readers[0], readers[1])
    candidates = {"bare": partial(bare_step, readers), "saml": partial(saml_step, readers, match)}
    if setting.apart:
        candidates["apart"] = partial(apart_step, readers, match)
    timings = compare(candidates, repeats, clock=time.process_time)
    results: dict[str, Any] = {"models": [described(each) for each in readers]}
    for name, timing in timings.items():
        low, high = timing.speed_quartiles
        results[name] = {"seconds": timing.seconds, "ratio": timing.time_ratio, "quartiles": [1 / high, 1 / low]}
    name = f"SAML step over two bare steps, {setting.name}"
    return results, Goal(name, timings["saml"].time_ratio, setting.limit, at_least=False)


def steps(settings: Sequence[Setting], repeats: int) -> tuple[dict[str, Any], list[Goal]]:
    """`step_ratios` of every setting."""
    found = {setting.name: step_ratios(setting, repeats) for setting in settings}
    rows = [
        (setting, step, value["seconds"], value["ratio"], "{:.3f} to {:.3f}".format(*value["quartiles"]))
        for setting, (results, _) in found.items()
        for step, value in results.items()
        if step != "models"
    ]
    print_table("Steps", ("setting", "step", "processor seconds", "over bare", "middle half of the turns"), rows)
    return {name: results for name, (results, _) in found.items()}, [goal for _, goal in found.values()]


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
        if kind == "joint":
            target_N = torch.arange(rows)
            sides = [JointSide(states, head, target_N) for states, head in zip(hidden, heads, strict=True)]
            sum(each.loss for each in joint_loss(sides[0], sides[1], folded, rows)).backward()
            return
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

    found = {kind: extra(kind, "inputs") for kind in ("naive_two_way", "two_way", "two_way_folded", "joint")}
    goals = [
        Goal(
            f"{name}, extra peak over naive full vocabulary", found[kind] / found["naive_two_way"], 0.45, at_least=False
        )
        for name, kind in (("two-way folded loss", "two_way_folded"), ("the same with both cross-entropies", "joint"))
    ]
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
    parser.add_argument("--skip-large", action="store_true", help="without the models of 0.3 billion and more")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = _SMALL if arguments.skip_large else (*_SMALL, _LARGE)
    parts = {"steps": steps(settings, arguments.repeats), "memory": memory(), "equality": equality()}
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
