"""On a graphics card: steps of mutual learning with models of real size, their time, memory and share of the card.

`make bench-large`. Random weights in bfloat16, an adapter on every linear layer, autocast in bfloat16; text and
tokenizers are those of `corpus`, vocabularies widened (`pairs`). Two couples:

* `server`: the LLM and the proxy, which has its tokenizer;
* `device`: an SLM and the proxy, with different tokenizers; one couple for each `--slm`.

Each is run as two bare steps (forward, cross-entropy, backward of each model), as a step of SAML, and with TRL's loss
from the same logits, in both directions: GKD's `generalized_jsd_loss` where the tokenizers are equal (at beta 0, the
forward KL, and without a cross-entropy, as TRL runs it), GOLD's hybrid loss with its cross-entropy where they are not.
Candidates take turns; one that runs out of memory is recorded as such and left out of the turns that follow.

What counts as a model's operations is said in `pairs.step_operations`; the share is of the rate that one large
bfloat16 product reaches on the same card.

Without a CUDA device it says so and runs nothing, unless `--device cpu` asks for a trial of the script itself.
"""

import argparse
import gc
import importlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring import print_table, write_results
from benchmarks.pairs import (
    Reader,
    Shape,
    bare_step,
    described,
    fold_matching,
    reader,
    saml_step,
    step_operations,
)
from cotuning.encoding import EncodedBatch
from cotuning.gradient_checkpointing import recomputed_layers

_KINDS = {"llm": "bpe_single_digits", "slm": "bpe_whole_numbers"}
_OUT_OF_MEMORY = "out of memory"


def has_trl() -> bool:
    """Whether TRL's losses can be compared with."""
    return find_spec("trl") is not None


def gkd_step(readers: Sequence[Reader]) -> None:
    """TRL's GKD loss in both directions from one forward pass of each model."""
    loss = importlib.import_module("trl.experimental.gkd.gkd_trainer").GKDTrainer.generalized_jsd_loss
    logits = _all_logits(readers)
    labels_BT = readers[0].batch.labels_BT[:, 1:]
    total = torch.zeros((), device=labels_BT.device)
    for student, teacher in ((0, 1), (1, 0)):
        taught = logits[student][:, :-1], logits[teacher][:, :-1].detach()
        total = total + loss(*taught, labels=labels_BT, beta=0)
    total.backward()


def gold_losses(readers: Sequence[Reader]) -> list[Callable[..., Tensor]]:
    """TRL's GOLD loss for either reader as the student, hybrid and with the merge that reads the right position."""
    make = importlib.import_module("trl.experimental.gold.gold_trainer").ULDLoss
    config = SimpleNamespace(
        uld_crossentropy_weight=1.0,
        uld_distillation_weight=1.0,
        uld_student_temperature=1.0,
        uld_teacher_temperature=1.0,
        uld_skip_student_eos=True,
        uld_skip_teacher_eos=True,
        use_extended_uld=True,
        uld_token_merge_strategy="bayesian",
        uld_use_hybrid_loss=True,
        uld_hybrid_matched_weight=None,
        uld_hybrid_unmatched_weight=None,
        beta=0.5,
    )
    return [
        make(config, student.lm.tokenizer, teacher.lm.tokenizer, device=student.lm.device)
        for student, teacher in (readers, readers[::-1])
    ]


def gold_step(readers: Sequence[Reader], losses: Sequence[Callable[..., Tensor]]) -> None:
    """TRL's GOLD loss in both directions from one forward pass of each model."""
    logits = _all_logits(readers)
    offsets = [byte_offsets(each.batch) for each in readers]
    total = torch.zeros((), device=logits[0].device)
    for loss, (student, teacher) in zip(losses, ((0, 1), (1, 0)), strict=True):
        total = total + loss(
            student_logits=logits[student],
            teacher_logits=logits[teacher].detach(),
            student_labels=readers[student].batch.labels_BT,
            teacher_labels=readers[teacher].batch.labels_BT,
            student_input_ids=readers[student].batch.input_ids_BT,
            teacher_input_ids=readers[teacher].batch.input_ids_BT,
            student_byte_offsets=offsets[student],
            teacher_byte_offsets=offsets[teacher],
        )
    total.backward()


def byte_offsets(batch: EncodedBatch) -> Tensor:
    """First and last byte of each token in its response, as GOLD wants them: [B, T, 2]."""
    starts_BT = batch.byte_ends_BT.roll(1, dims=1)
    starts_BT[:, 0] = 0
    return torch.stack([starts_BT, batch.byte_ends_BT], dim=-1)


def _all_logits(readers: Sequence[Reader]) -> list[Tensor]:
    for each in readers:
        each.forget_gradients()
    return [each.lm.model(input_ids=each.batch.input_ids_BT, use_cache=False).logits for each in readers]


class Turns:
    """Runs candidates in turns on one device, and remembers seconds, greatest memory and what ran out of it."""

    def __init__(self, candidates: Mapping[str, Callable[[], None]], device: torch.device) -> None:
        self._candidates = dict(candidates)
        self._on_card = device.type == "cuda"
        self._seconds: dict[str, list[float]] = {name: [] for name in candidates}
        self._peaks: dict[str, int] = {}
        self._ran_out: set[str] = set()

    def run(self, repeats: int) -> None:
        """One turn to warm up, and `repeats` that count, in alternating order."""
        for turn in range(1 + repeats):
            order = [name for name in self._candidates if name not in self._ran_out]
            for name in order if turn % 2 == 0 else reversed(order):
                seconds = self._one(name)
                if seconds is not None and turn:
                    self._seconds[name].append(seconds)

    def _one(self, name: str) -> float | None:
        self._wait()
        if self._on_card:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        try:
            self._candidates[name]()
            self._wait()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self._ran_out.add(name)
        seconds = time.perf_counter() - start
        if name in self._ran_out:  # only here, after the exception and what it held are gone
            free_memory(self._on_card)
            return None
        if self._on_card:
            self._peaks[name] = max(self._peaks.get(name, 0), torch.cuda.max_memory_allocated())
        return seconds

    def _wait(self) -> None:
        if self._on_card:
            torch.cuda.synchronize()

    def results(self) -> dict[str, dict[str, Any]]:
        """By candidate: seconds (median and all), over those of the first, and the card's greatest memory."""
        first = next(iter(self._candidates))
        found: dict[str, dict[str, Any]] = {}
        for name, seconds in self._seconds.items():
            if name in self._ran_out:
                found[name] = {"failed": _OUT_OF_MEMORY}
                continue
            pairs = [] if first in self._ran_out else list(zip(seconds, self._seconds[first], strict=True))
            found[name] = {
                "seconds": statistics.median(seconds),
                "all_seconds": seconds,
                "over_bare": statistics.median(own / bare for own, bare in pairs) if pairs else None,
                "peak_bytes": self._peaks.get(name),
            }
        return found


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the card had no room: for a tensor, or for what cuBLAS works with."""
    return isinstance(error, torch.OutOfMemoryError) or "CUBLAS_STATUS_ALLOC_FAILED" in str(error)


def free_memory(on_card: bool) -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    if on_card:
        torch.cuda.empty_cache()


def product_rate(size: int, device: torch.device, repeats: int = 10) -> float:
    """Operations a second of the fastest of several bfloat16 products of two square matrices."""
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    best = float("inf")
    for turn in range(repeats + 2):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        if turn > 1:
            best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def couple(
    readers: Sequence[Reader], device: torch.device, *, repeats: int, rate: float, checkpointing: bool
) -> dict[str, Any]:
    """Every candidate on one couple of models."""
    match = fold_matching(readers[0], readers[1])
    candidates: dict[str, Callable[[], None]] = {
        "bare": partial(bare_step, readers),
        "saml": partial(saml_step, readers, match),
    }
    if has_trl():
        if readers[0].lm.table.fingerprint == readers[1].lm.table.fingerprint:
            candidates["trl_gkd"] = partial(gkd_step, readers)
        else:
            candidates["trl_gold"] = partial(gold_step, readers, gold_losses(readers))
    turns = Turns({name: partial(_in_bfloat16, step, device) for name, step in candidates.items()}, device)
    resident = torch.cuda.memory_allocated() if device.type == "cuda" else None
    with _recomputed(readers, checkpointing):
        turns.run(repeats)
    operations = step_operations(readers)
    results = turns.results()
    for name in ("bare", "saml"):
        if "seconds" in results[name]:
            results[name]["share_of_product_rate"] = operations / results[name]["seconds"] / rate
    return {
        "models": [described(each) for each in readers],
        "operations": operations,
        "resident_bytes": resident,
        "steps": results,
    }


def _in_bfloat16(step: Callable[[], None], device: torch.device) -> None:
    with torch.autocast(device.type, dtype=torch.bfloat16):
        step()


def _recomputed(readers: Sequence[Reader], enabled: bool) -> AbstractContextManager[Any]:
    stack = ExitStack()
    for each in readers:
        stack.enter_context(recomputed_layers(each.lm, enabled=enabled))
    return stack


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All couples, one after the other: models of one are freed before those of the next are made."""
    device = torch.device(arguments.device)
    rate = product_rate(arguments.product_size, device)
    make = partial(
        reader,
        rows=arguments.rows,
        length=arguments.length,
        dtype=torch.bfloat16,
        device=device,
        lora_rank=arguments.lora_rank,
    )
    options: dict[str, Any] = {
        "repeats": arguments.repeats,
        "rate": rate,
        "checkpointing": arguments.gradient_checkpointing,
    }
    couples = {"server": (arguments.llm, _KINDS["llm"], arguments.llm_vocabulary)}
    for text in arguments.slm:
        couples[f"device, SLM {text}"] = (text, _KINDS["slm"], arguments.slm_vocabulary)
    found: dict[str, Any] = {}
    for name, (shape, kind, vocabulary) in couples.items():
        try:
            readers = [
                make(kind, Shape.parse(shape), vocabulary),
                make(_KINDS["llm"], Shape.parse(arguments.proxy), arguments.llm_vocabulary),
            ]
            found[name] = couple(readers, device, **options)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            found[name] = {"failed": f"{_OUT_OF_MEMORY} while the models were made"}
        _print_couple(name, found[name])
        readers = []
        free_memory(device.type == "cuda")
    card = torch.cuda.get_device_name() if device.type == "cuda" else "none: a trial on the processor"
    return {"device": card, "product_operations_a_second": rate, "arguments": vars(arguments), "couples": found}


def _print_couple(name: str, results: Mapping[str, Any]) -> None:
    if "steps" not in results:
        print(f"{name}: {results['failed']}")
        return
    rows = []
    for step, value in results["steps"].items():
        if "failed" in value:
            rows.append((step, value["failed"], "", "", ""))
            continue
        peak, over, share = value["peak_bytes"], value["over_bare"], value.get("share_of_product_rate")
        rows.append(
            (
                step,
                value["seconds"],
                "" if over is None else over,
                "" if peak is None else peak / 2**30,
                "" if share is None else share,
            )
        )
    print_table(name, ("step", "seconds", "over bare", "peak GiB", "share of product rate"), rows)


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments; a shape is `hidden,layers,heads,key_value_heads,intermediate[,tied]`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--llm", default="4096,36,32,8,12288", help="as Qwen3-8B")
    parser.add_argument("--proxy", default="896,24,14,2,4864,tied", help="as Qwen2.5-0.5B")
    parser.add_argument("--slm", action="append", help="may be repeated; as SmolLM2-135M and Qwen2.5-1.5B if not given")
    parser.add_argument("--llm-vocabulary", type=int, default=151_936, help="of LLM and proxy")
    parser.add_argument("--slm-vocabulary", type=int, default=128_256)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024, help="tokens a row")
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5, help="timed turns")
    parser.add_argument("--product-size", type=int, default=8192, help="of the matrices that give the card's rate")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    arguments = parser.parse_args(given)
    arguments.slm = arguments.slm or ["576,30,9,3,1536,tied", "1536,28,12,2,8960,tied"]
    return arguments


def main(given: Sequence[str] | None = None) -> None:
    """Measure, print, write; or say what is missing."""
    arguments = parse(given)
    if torch.device(arguments.device).type == "cuda" and not torch.cuda.is_available():
        print(
            "bench-large needs a CUDA device, and PyTorch sees none: nothing was run. Its default sizes are meant for "
            "a card of 80 GB; smaller shapes and --gradient-checkpointing need less. --device cpu tries the script."
        )
        return
    if not has_trl():
        print("trl cannot be imported (pip install 'cotune[bench]'): no comparison with GKD and GOLD")
    write_results("large", measure(arguments))


if __name__ == "__main__":
    main()
