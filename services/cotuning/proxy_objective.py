"""What the proxy's distillation reads at each step, and what it minimises. The loop around it is in `proxy`.

Names: S span starts, N response tokens.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TypedDict

import torch
from torch import Tensor

from cotuning.alignment import align
from cotuning.cross_entropy import cross_entropy, response_tokens
from cotuning.divergences import Divergence
from cotuning.encoded_rows import EncodedRows
from cotuning.encoding import EncodedBatch
from cotuning.examples import Example
from cotuning.folding import FoldPair
from cotuning.generation import sample
from cotuning.hidden_distillation import feature_loss, fresh_projections, map_layers, relation_loss
from cotuning.language_model import LanguageModel, all_hidden_states, hidden_states, output_head
from cotuning.mutual_loss import mutual_loss
from cotuning.seeding import derive_seed
from cotuning.training import Precision, Step, autocast, draw_batches, row_sizes


def on_policy_steps(steps: int, fraction: float, seed: int) -> frozenset[int]:
    """Each step by itself with the probability `fraction`."""
    draws = torch.rand(steps, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return frozenset((draws < fraction).nonzero().flatten().tolist())


class PublicReader:
    """What teacher and student read at each step: a function of the step and, on policy, of the student's weights."""

    def __init__(
        self,
        llm: LanguageModel,
        proxy: LanguageModel,
        examples: Sequence[Example],
        *,
        steps: int,
        batch_size: int,
        on_policy_fraction: float,
        on_policy_tokens: int,
        max_length: int,
        seed: int,
    ) -> None:
        self._rows = tuple(EncodedRows(lm, examples, max_length=max_length) for lm in (llm, proxy))
        self._student = proxy
        self._batches = draw_batches(
            row_sizes(examples), batch_size=batch_size, steps=steps, seed=derive_seed(seed, "order")
        )
        self.on_policy = on_policy_steps(steps, on_policy_fraction, derive_seed(seed, "on_policy"))
        self._max_new_tokens = on_policy_tokens
        self._max_length = max_length
        self._seed = seed
        given = [batch for step, batch in enumerate(self._batches) if step not in self.on_policy]
        for rows in self._rows:
            rows.encode(index for batch in given for index in batch)

    def batches(self, step: int) -> tuple[EncodedBatch, EncodedBatch]:
        """The teacher's and the student's encoding of one step's rows."""
        indices = self._batches[step]
        llm_rows, proxy_rows = self._rows
        if step not in self.on_policy:
            return llm_rows.batch(indices), proxy_rows.batch(indices)
        prompts = [proxy_rows.examples[index] for index in indices]
        answers = sample(
            self._student,
            prompts,
            max_new_tokens=self._max_new_tokens,
            seed=derive_seed(self._seed, "sample", step),
            max_length=self._max_length,
        )
        # As text, so that a teacher with another tokenizer reads it too; tokens are those of the text, not as drawn.
        sampled = [replace(prompt, output=answer) for prompt, answer in zip(prompts, answers, strict=True)]
        llm_batch, proxy_batch = (
            EncodedRows(rows.lm, sampled, max_length=self._max_length).batch(range(len(sampled))) for rows in self._rows
        )
        return llm_batch, proxy_batch


class _Required(TypedDict):
    distillation_weight: float
    temperature: float


class Objective(_Required, total=False):
    """The arguments that say what is minimised; see `DistillationObjective`."""

    divergence: Divergence
    jsd_beta: float
    feature_weight: float
    relation_weight: float
    precision: Precision


class DistillationObjective:
    """The objective of a batch.

    Args:
        llm: the teacher, only read.
        proxy: the student; its tokenizer may be another one.
        fold: with the proxy as side A.
        distillation_weight: lambda in [0, 1].
        temperature: tau.
        divergence: D, teacher to student.
        jsd_beta: the teacher's weight in the mixture, for `jsd`.
        feature_weight: of `hidden_distillation.feature_loss`, all layers.
        relation_weight: of `hidden_distillation.relation_loss`, all layers.
        precision: of the forward passes.
        seed: of the maps that `feature_loss` learns.

    Raises:
        ValueError: a negative weight.
    """

    def __init__(
        self,
        llm: LanguageModel,
        proxy: LanguageModel,
        fold: FoldPair,
        *,
        distillation_weight: float,
        temperature: float,
        divergence: Divergence = "forward_kl",
        jsd_beta: float = 0.5,
        feature_weight: float = 0.0,
        relation_weight: float = 0.0,
        precision: Precision = "float32",
        seed: int,
    ) -> None:
        for name, weight in (("feature_weight", feature_weight), ("relation_weight", relation_weight)):
            if weight < 0:
                raise ValueError(f"expected {name} of at least 0, got {weight}")
        self.llm, self.proxy = llm, proxy
        self._heads = output_head(llm), output_head(proxy)
        self._fold = fold
        self._compare = partial(
            mutual_loss,
            temperature=temperature,
            divergence=divergence,
            jsd_beta=jsd_beta,
            weight_a=1.0 if distillation_weight else None,
            weight_b=None,
        )
        self._weight = distillation_weight
        self._weights = {"feature": feature_weight, "relation": relation_weight}
        self._precision = precision
        self._layers = map_layers(proxy.base.config.num_hidden_layers, llm.base.config.num_hidden_layers)
        self.projections: list[Tensor] = []
        if feature_weight:
            sizes = _sizes(proxy), _sizes(llm)  # of each layer: OPT's last one may be narrower
            pairs = [(sizes[0][mine], sizes[1][theirs]) for mine, theirs in self._layers]
            self.projections = fresh_projections(pairs, seed=seed, device=proxy.device)

    @property
    def has_teacher(self) -> bool:
        """Whether anything that the LLM says has weight."""
        return bool(self._weight) or any(self._weights.values())

    def step(self, llm_batch: EncodedBatch, proxy_batch: EncodedBatch, *, on_policy: bool) -> Step:
        """One batch; without cross-entropy if the student itself wrote it."""
        spans = align(proxy_batch, llm_batch)
        place_proxy, place_llm = (spans.sample_S, spans.row_a_S), (spans.sample_S, spans.row_b_S)
        llm_head, proxy_head = self._heads
        with autocast(self.llm, self._precision):
            proxy_states = self._read(self.proxy, proxy_batch)
            with torch.no_grad():
                llm_states = self._read(self.llm, llm_batch)
            distance, _ = self._compare(
                proxy_states[-1][place_proxy],
                proxy_head,
                llm_states[-1][place_llm],
                llm_head,
                self._fold,
                after_break_S=self._fold.after_break(spans),
            )
            if on_policy:
                objective = self._weight * distance
                report = {"on_policy_divergence": distance.detach()}
            else:
                tokens = response_tokens(proxy_batch)
                loss, _ = cross_entropy(
                    proxy_states[-1][tokens.sample_N, tokens.position_N], proxy_head, tokens.target_N
                )
                objective = (1 - self._weight) * loss + self._weight * distance
                report = {"ce": loss.detach(), "divergence": distance.detach()}
        for name, term in self._hidden_terms(proxy_states, llm_states, place_proxy, place_llm).items():
            objective = objective + self._weights[name] * term
            report[name] = term.detach()
        return Step({"proxy": objective}, report)

    def _read(self, lm: LanguageModel, batch: EncodedBatch) -> tuple[Tensor, ...]:
        """Every layer's hidden states if they are compared, else the last ones only."""
        if any(self._weights.values()):
            return all_hidden_states(lm, batch.input_ids_BT)
        return (hidden_states(lm, batch.input_ids_BT),)

    def _hidden_terms(
        self,
        proxy_states: Sequence[Tensor],
        llm_states: Sequence[Tensor],
        place_proxy: tuple[Tensor, Tensor],
        place_llm: tuple[Tensor, Tensor],
    ) -> dict[str, Tensor]:
        if not any(self._weights.values()):
            return {}
        student = [proxy_states[index][place_proxy] for index, _ in self._layers]
        teacher = [llm_states[index][place_llm] for _, index in self._layers]
        terms: dict[str, Tensor] = {}
        if self._weights["feature"]:
            terms["feature"] = feature_loss(student, teacher, self.projections)
        if self._weights["relation"]:
            terms["relation"] = relation_loss(student, teacher, place_proxy[0])
        return terms


@torch.no_grad()
def _sizes(lm: LanguageModel) -> list[int]:
    """Dimensions of the hidden states after the embedding and each layer."""
    states = all_hidden_states(lm, torch.zeros(1, 1, dtype=torch.int64, device=lm.device))
    return [state.shape[-1] for state in states]
