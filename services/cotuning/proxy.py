"""The distilled proxy model (DPM): a small model of the LLM's own kind that can travel to devices.

Made from the LLM (`proxy_creation`) or given, then distilled on public rows: `(1 - lambda) CE + lambda tau^2 D(p_L ||
p_P)` over response tokens (Co-PLMs, arXiv 2511.11678; all of the proxy's weights learn, as its adapters come later), if
wanted with terms on hidden states (`hidden_distillation`) and partly on the proxy's own samples (GKD).

Names: S span starts, N response tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Unpack

import torch
from torch import Tensor

from cotuning.alignment import align
from cotuning.checkpoints import Checkpoints
from cotuning.cross_entropy import cross_entropy, response_tokens
from cotuning.encoded_rows import EncodedRows
from cotuning.examples import Example
from cotuning.folding import FoldPair, fold_pair
from cotuning.gradient_checkpointing import recomputed_layers
from cotuning.heads import FoldedHead, Head
from cotuning.language_model import LanguageModel, hidden_states, output_head
from cotuning.proxy_objective import DistillationObjective, Objective, PublicReader
from cotuning.seeding import derive_seed, isolated_generators
from cotuning.training import Learner, OnProgress, Step, train

STAGE = "distillation"
AGREEMENT_STAGE = "distillation_agreement"
_HELD_OUT_SHARE = 0.1
_MAX_HELD_OUT = 64
_MEASURED_AT_ONCE = 16


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
    on_policy_fraction: float = 0.0,
    on_policy_tokens: int = 64,
    max_length: int,
    gradient_checkpointing: bool = False,
    seed: int,
    on_progress: OnProgress,
    checkpoints: Checkpoints | None = None,
    **objective: Unpack[Objective],
) -> dict[str, float]:
    """Train all of the proxy's weights, in place.

    A tenth of the rows, at most 64 and at least one, is held out and measured before and after; with a single row
    that row is both.

    Args:
        llm: the teacher, only read.
        proxy: its tokenizer may be another one.
        examples: public rows.
        on_policy_fraction: share of the steps, in [0, 1], on responses that the proxy itself samples to the rows'
            prompts (GKD, arXiv 2306.13649). Such a step has no cross-entropy: a sample is no truth.
        on_policy_tokens: longest sample.
        gradient_checkpointing: see there; of the proxy.
        on_progress: of the training's steps, and of the rows measured before and after it.
        checkpoints: see `training.train`.
        objective: as for `DistillationObjective`; the maps of its features are dropped at the end.

    Returns:
        `kl_before`, `kl_after`, `top1_before`, `top1_after`, `proxy_ce_before`, `proxy_ce_after`, `llm_ce` on held-out
        rows (see `Agreement`); `ce` and `divergence`, and where they are asked for `feature`, `relation` and
        `on_policy_divergence`, means over the last tenth of the steps.

    Raises:
        ValueError: no rows, a negative weight, a fraction outside [0, 1], or an on-policy fraction when nothing weighs
            what the teacher says.
    """
    held_out, kept = _hold_out(examples, derive_seed(seed, "held_out"))
    fold = fold_pair(proxy.tokenizer, proxy.table, llm.tokenizer, llm.table).to(llm.device)
    distillation = DistillationObjective(llm, proxy, fold, seed=seed, **objective)
    _require_on_policy(on_policy_fraction, distillation)
    measure = partial(
        measure_agreement, llm, proxy, held_out, fold=fold, max_length=max_length, on_progress=on_progress
    )
    before = measure()
    if not steps:
        return _before_and_after(before, before)
    reader = PublicReader(
        llm,
        proxy,
        kept,
        steps=steps,
        batch_size=batch_size,
        on_policy_fraction=on_policy_fraction,
        on_policy_tokens=on_policy_tokens,
        max_length=max_length,
        seed=seed,
    )
    with recomputed_layers(proxy, enabled=gradient_checkpointing), isolated_generators(seed, proxy.device):
        losses = _train_whole(
            distillation,
            reader,
            steps=steps,
            learning_rate=learning_rate,
            on_progress=on_progress,
            checkpoints=checkpoints,
        )
    return losses | _before_and_after(before, measure())


def _before_and_after(before: Agreement, after: Agreement) -> dict[str, float]:
    return {
        "kl_before": before.kl,
        "kl_after": after.kl,
        "top1_before": before.top1,
        "top1_after": after.top1,
        "proxy_ce_before": before.proxy_ce,
        "proxy_ce_after": after.proxy_ce,
        "llm_ce": after.llm_ce,
    }


def _require_on_policy(fraction: float, distillation: DistillationObjective) -> None:
    if not 0 <= fraction <= 1:
        raise ValueError(f"expected on_policy_fraction from 0 to 1, got {fraction}")
    if fraction and not distillation.has_teacher:
        raise ValueError(f"expected a weight above 0 for the teacher's part of on-policy steps ({fraction}), got none")


def _train_whole(
    distillation: DistillationObjective,
    reader: PublicReader,
    *,
    steps: int,
    learning_rate: float,
    on_progress: OnProgress,
    checkpoints: Checkpoints | None,
) -> dict[str, float]:
    """Train every weight, without dropout: the teacher's distributions are regularisation enough. The learning rate
    falls to nothing, because this is done once."""
    proxy = distillation.proxy

    def step_at(step: int) -> list[Step]:
        return [distillation.step(*reader.batches(step), on_policy=step in reader.on_policy)]

    proxy.model.eval()
    proxy.model.requires_grad_(True)
    try:
        learner = Learner([*proxy.model.parameters(), *distillation.projections], learning_rate)
        return train(
            {"proxy": learner},
            step_at,
            steps=steps,
            stage=STAGE,
            on_progress=on_progress,
            schedule="linear",
            checkpoints=checkpoints,
        )
    finally:
        proxy.model.requires_grad_(False)


@torch.no_grad()
def measure_agreement(
    llm: LanguageModel,
    proxy: LanguageModel,
    examples: Sequence[Example],
    *,
    fold: FoldPair,
    max_length: int,
    on_progress: OnProgress | None = None,
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
        if on_progress:
            on_progress(AGREEMENT_STAGE, chosen.stop, len(examples), {})
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
