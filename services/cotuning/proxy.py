"""The distilled proxy model (DPM): a small model of the LLM's own kind that can travel to devices.

Made from the LLM, then distilled from it on public rows: `(1 - lambda) CE + lambda tau^2 D(p_L || p_P)` over response
tokens (Co-PLMs, arXiv 2511.11678; all of the proxy's weights learn, as its adapters come later). Which layers are kept
is our choice: evenly spread, first and last always among them (the ends of a decoder are the ones it cannot spare,
arXiv 2403.03853).

Names: S span starts.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from cotuning.alignment import align
from cotuning.cross_entropy import cross_entropy, response_tokens
from cotuning.divergences import Divergence
from cotuning.encoded_rows import EncodedRows
from cotuning.examples import Example
from cotuning.folding import FoldPair, fold_pair
from cotuning.heads import FoldedHead, Head
from cotuning.language_model import LanguageModel, hidden_states, output_head
from cotuning.mutual_loss import mutual_loss
from cotuning.seeding import derive_seed, isolated_generators
from cotuning.training import Learner, OnProgress, Precision, Step, autocast, draw_batches, row_sizes, train

STAGE = "distillation"
_HELD_OUT_SHARE = 0.1
_MAX_HELD_OUT = 64
_MEASURED_AT_ONCE = 16


def create_proxy(
    llm: LanguageModel,
    *,
    source: Literal["prune", "config"],
    layers: int,
    hidden_size: int | None = None,
    seed: int,
) -> LanguageModel:
    """A new model with the LLM's architecture and tokenizer, float32, on the CPU; the LLM is only read.

    Args:
        llm: without adapters.
        source: `prune` keeps every k-th layer of the LLM with its weights, and its embeddings and head; `config` makes
            a fresh model from the LLM's config.
        layers: kept or made.
        hidden_size: `config` only; default half of the LLM's.
        seed: of fresh weights.

    Raises:
        ValueError: more layers than the LLM has, a `hidden_size` for `prune`, or an architecture whose layers are not
            found.
    """
    if source == "prune":
        if hidden_size is not None:
            raise ValueError(f"expected no hidden_size for source 'prune', got {hidden_size}")
        return _prune(llm, layers, seed)
    if source == "config":
        config = _narrowed(llm.base.config, layers, hidden_size)
        return llm.with_model(_fresh_model(config, seed))
    raise ValueError(f"expected source 'prune' or 'config', got {source!r}")


@dataclass(frozen=True)
class Agreement:
    """How close the proxy is to the LLM on held-out rows.

    Attributes:
        kl: mean KL(p_L || p_P) at span starts, nats.
        top1: share of span starts where both hold the same class most probable.
        llm_ce, proxy_ce: cross-entropy of either, nats a token.
    """

    kl: float
    top1: float
    llm_ce: float
    proxy_ce: float


def distil_proxy(
    llm: LanguageModel,
    proxy: LanguageModel,
    examples: Sequence[Example],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    distillation_weight: float,
    temperature: float,
    divergence: Divergence = "forward_kl",
    max_length: int,
    precision: Precision = "float32",
    seed: int,
    on_progress: OnProgress,
) -> dict[str, float]:
    """Train all of the proxy's weights, in place.

    A tenth of the rows, at most 64 and at least one, is held out and measured before and after; with a single row
    that row is both.

    Args:
        llm: the teacher, only read.
        proxy: its tokenizer may be another one.
        examples: public rows.
        distillation_weight: lambda in [0, 1].
        temperature: tau.
        divergence: D, teacher to student.

    Returns:
        `kl_before`, `kl_after`, `top1_before`, `top1_after`, `proxy_ce_before`, `proxy_ce_after`, `llm_ce` on held-out
        rows (see `Agreement`); `ce` and `divergence`, means of the last tenth of the steps.
    """
    held_out, kept = _hold_out(examples, derive_seed(seed, "held_out"))
    fold = fold_pair(proxy.tokenizer, proxy.table, llm.tokenizer, llm.table).to(llm.device)
    before = measure_agreement(llm, proxy, held_out, fold=fold, max_length=max_length)
    losses: dict[str, float] = {}
    if steps:
        batches = draw_batches(row_sizes(kept), batch_size=batch_size, steps=steps, seed=derive_seed(seed, "order"))
        compare = partial(
            mutual_loss,
            temperature=temperature,
            divergence=divergence,
            weight_a=1.0 if distillation_weight else None,
            weight_b=None,
        )
        step_at = _distillation_steps(
            EncodedRows(llm, kept, max_length=max_length),
            EncodedRows(proxy, kept, max_length=max_length),
            batches,
            fold,
            compare=compare,
            distillation_weight=distillation_weight,
            precision=precision,
        )
        losses = _train_whole(proxy, step_at, steps=steps, learning_rate=learning_rate, on_progress=on_progress)
    after = measure_agreement(llm, proxy, held_out, fold=fold, max_length=max_length) if steps else before
    return losses | {
        "kl_before": before.kl,
        "kl_after": after.kl,
        "top1_before": before.top1,
        "top1_after": after.top1,
        "proxy_ce_before": before.proxy_ce,
        "proxy_ce_after": after.proxy_ce,
        "llm_ce": after.llm_ce,
    }


def _distillation_steps(
    llm_rows: EncodedRows,
    proxy_rows: EncodedRows,
    batches: Sequence[Sequence[int]],
    fold: FoldPair,
    *,
    compare: Callable[..., tuple[Tensor, Tensor]],
    distillation_weight: float,
    precision: Precision,
) -> Callable[[int], Step]:
    """What the loop computes at each step; `compare` gives the divergence from teacher (second) to student (first)."""
    llm, proxy = llm_rows.lm, proxy_rows.lm
    llm_head, proxy_head = output_head(llm), output_head(proxy)
    for rows in (llm_rows, proxy_rows):
        rows.encode(index for batch in batches for index in batch)

    def step_at(step: int) -> Step:
        llm_batch, proxy_batch = llm_rows.batch(batches[step]), proxy_rows.batch(batches[step])
        spans = align(proxy_batch, llm_batch)
        with autocast(llm, precision):
            proxy_BTD = hidden_states(proxy, proxy_batch.input_ids_BT)
            with torch.no_grad():
                llm_SD = hidden_states(llm, llm_batch.input_ids_BT)[spans.sample_S, spans.row_b_S]
            student_SD = proxy_BTD[spans.sample_S, spans.row_a_S]
            after_break_S = fold.after_break(spans)
            distance, _ = compare(student_SD, proxy_head, llm_SD, llm_head, fold, after_break_S=after_break_S)
            tokens = response_tokens(proxy_batch)
            loss, _ = cross_entropy(proxy_BTD[tokens.sample_N, tokens.position_N], proxy_head, tokens.target_N)
        objective = (1 - distillation_weight) * loss + distillation_weight * distance
        return Step({"proxy": objective}, {"ce": loss.detach(), "divergence": distance.detach()})

    return step_at


def _train_whole(
    proxy: LanguageModel,
    step_at: Callable[[int], Step],
    *,
    steps: int,
    learning_rate: float,
    on_progress: OnProgress,
) -> dict[str, float]:
    """Train every weight, without dropout: the teacher's distributions are regularisation enough. The learning rate
    falls to nothing, because this is done once."""
    proxy.model.eval()
    proxy.model.requires_grad_(True)
    try:
        learner = Learner([*proxy.model.parameters()], learning_rate)
        return train({"proxy": learner}, step_at, steps=steps, stage=STAGE, on_progress=on_progress, decay=True)
    finally:
        proxy.model.requires_grad_(False)


@torch.no_grad()
def measure_agreement(
    llm: LanguageModel, proxy: LanguageModel, examples: Sequence[Example], *, fold: FoldPair, max_length: int
) -> Agreement:
    """Compare both models on `examples` at temperature 1; `fold` has the proxy as side A."""
    sides = [(model, output_head(model), EncodedRows(model, examples, max_length=max_length)) for model in (proxy, llm)]
    divergence = same_top = 0.0
    losses = [0.0, 0.0]
    num_spans, num_tokens = 0, [0, 0]
    for start in range(0, len(examples), _MEASURED_AT_ONCE):
        chosen = range(start, min(start + _MEASURED_AT_ONCE, len(examples)))
        batches = [rows.batch(chosen) for _, _, rows in sides]
        spans = align(*batches)
        heads: list[tuple[Tensor, Head]] = []
        for place, ((model, head, _), row_S) in enumerate(zip(sides, (spans.row_a_S, spans.row_b_S), strict=True)):
            hidden_BTD = hidden_states(model, batches[place].input_ids_BT)
            tokens = response_tokens(batches[place])
            _, losses_N = cross_entropy(hidden_BTD[tokens.sample_N, tokens.position_N], head, tokens.target_N)
            losses[place] += float(losses_N.sum())
            num_tokens[place] += len(losses_N)
            heads.append((hidden_BTD[spans.sample_S, row_S], head))
        for part, index_N in fold.parts(fold.after_break(spans), spans.num_spans):
            maps = (None, None) if part.identical else (part.map_a_V, part.map_b_V)
            student_NC, teacher_NC = (
                FoldedHead(
                    hidden_SD[index_N], head, map_V, part.num_classes, temperature=1.0, scale=0.0
                ).class_log_probs(slice(None))
                for (hidden_SD, head), map_V in zip(heads, maps, strict=True)
            )
            divergence += float((teacher_NC.exp() * (teacher_NC - student_NC)).sum())
            same_top += float((teacher_NC.argmax(1) == student_NC.argmax(1)).sum())
        num_spans += spans.num_spans
    return Agreement(
        kl=divergence / max(num_spans, 1),
        top1=same_top / max(num_spans, 1),
        proxy_ce=losses[0] / max(num_tokens[0], 1),
        llm_ce=losses[1] / max(num_tokens[1], 1),
    )


def _hold_out(examples: Sequence[Example], seed: int) -> tuple[list[Example], list[Example]]:
    if not examples:
        raise ValueError("expected at least one public row to distil on, got none")
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    count = min(_MAX_HELD_OUT, max(1, round(len(examples) * _HELD_OUT_SHARE)))
    held_out = [examples[index] for index in sorted(order[:count])]
    kept = [examples[index] for index in sorted(order[count:])]
    return held_out, kept or held_out


def _fresh_model(config: Any, seed: int) -> Any:
    with isolated_generators(seed):
        return AutoModelForCausalLM.from_config(config).float().eval()


def _prune(llm: LanguageModel, layers: int, seed: int) -> LanguageModel:
    config = llm.base.config
    total = config.num_hidden_layers
    if not 1 <= layers <= total:
        raise ValueError(f"expected 1 to {total} layers, the LLM has no more; got {layers}")
    path = _layers_path(llm.base, total)
    kept = [round(place * (total - 1) / max(layers - 1, 1)) for place in range(layers)]
    model = _fresh_model(_with_layers(config, kept), seed)
    state: dict[str, Tensor] = {}
    for name, tensor in llm.base.state_dict().items():
        if not name.startswith(f"{path}."):
            state[name] = tensor
            continue
        index, _, rest = name.removeprefix(f"{path}.").partition(".")
        if int(index) in kept:
            state[f"{path}.{kept.index(int(index))}.{rest}"] = tensor
    model.load_state_dict(state)
    return llm.with_model(model)


def _layers_path(model: torch.nn.Module, total: int) -> str:
    """Name of the list of decoder layers."""
    paths = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == total
    ]
    if not paths:
        raise ValueError(f"expected a list of {total} decoder layers in {type(model).__name__}, found none")
    return str(min(paths, key=lambda name: name.count(".")))


def _with_layers(config: Any, kept: Sequence[int]) -> Any:
    """The config of a model with only these layers; lists with one entry a layer (`layer_types`) are cut alike."""
    total = config.num_hidden_layers
    changed = copy.deepcopy(config)
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == total:
            setattr(changed, name, [value[index] for index in kept])
    changed.num_hidden_layers = len(kept)
    return changed


def _narrowed(config: Any, layers: int, hidden_size: int | None) -> Any:
    """The config of a smaller sibling: heads keep their size where they can, feed-forward layers their ratio."""
    total, width, heads = config.num_hidden_layers, config.hidden_size, config.num_attention_heads
    narrow = hidden_size or width // 2
    changed = _with_layers(config, [min(total - 1, place * total // layers) for place in range(layers)])
    changed.hidden_size = narrow
    head_size = getattr(config, "head_dim", None) or width // heads
    new_heads = max(1, round(heads * narrow / width))
    if head_size * heads == width:  # else (Qwen 3) heads have a size of their own, and keep it
        while narrow % new_heads:
            new_heads -= 1
        if getattr(config, "head_dim", None):
            changed.head_dim = narrow // new_heads
    changed.num_attention_heads = new_heads
    groups = getattr(config, "num_key_value_heads", None)
    if groups:
        changed.num_key_value_heads = math.gcd(new_heads, max(1, groups * new_heads // heads))
    for name in ("intermediate_size", "ffn_dim", "n_inner", "word_embed_proj_dim"):
        size = getattr(config, name, None)
        if isinstance(size, int):
            setattr(changed, name, max(1, size * narrow // width))
    return changed
