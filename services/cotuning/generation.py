"""A model's own answers, greedy or sampled.

Names: B rows of a batch, T tokens, D hidden size, V token ids.

A loop of our own: rows of like length together, prompts padded on the left, one cache, the head on the last position
only. Greedy, it gives what `transformers`' greedy `generate` gives row by row, without its per-token overhead, which
for small models is most of the time.
"""

import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from cotuning.encoding import encode_batch
from cotuning.examples import Example, render_prompt
from cotuning.heads import Head
from cotuning.language_model import LanguageModel, logits, output_head

DEFAULT_MAX_LENGTH = 512

OnRows = Callable[[int, int], None]
"""Called between forward passes with rows done and rows in all. What it raises ends the work there, with the model as
it was lent."""

_Choose = Callable[[Tensor], Tensor]
"""Next tokens [B] from logits [B, V]."""


@torch.no_grad()
def generate(
    lm: LanguageModel,
    rows: Sequence[Example],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    max_length: int = DEFAULT_MAX_LENGTH,
    on_rows: OnRows | None = None,
) -> list[str]:
    """The model's greedy answers, in the order of `rows`; each stops before the end token."""
    return _answer(
        lm,
        rows,
        _most_likely,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        max_length=max_length,
        on_rows=on_rows,
    )


@torch.no_grad()
def sample(
    lm: LanguageModel,
    rows: Sequence[Example],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int,
    batch_size: int = 64,
    max_length: int = DEFAULT_MAX_LENGTH,
) -> list[str]:
    """Answers drawn from the model's own distribution, in the order of `rows`.

    Args:
        temperature: logits are divided by it; above 0.
        seed: the only randomness; torch's global generators are not used.

    Raises:
        ValueError: a temperature that is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"expected a temperature above 0, got {temperature}")
    generator = torch.Generator(lm.device).manual_seed(seed)

    def draw(logits_BV: Tensor) -> Tensor:
        return torch.multinomial((logits_BV / temperature).softmax(-1), 1, generator=generator).squeeze(1)

    return _answer(lm, rows, draw, max_new_tokens=max_new_tokens, batch_size=batch_size, max_length=max_length)


def _most_likely(logits_BV: Tensor) -> Tensor:
    return logits_BV.argmax(-1)


def _answer(
    lm: LanguageModel,
    rows: Sequence[Example],
    choose: _Choose,
    *,
    max_new_tokens: int,
    batch_size: int,
    max_length: int,
    on_rows: OnRows | None = None,
) -> list[str]:
    prompts = [render_prompt(lm.tokenizer, row) for row in rows]
    encoded = encode_batch(lm.tokenizer, lm.table, prompts, [""] * len(rows), max_length=max_length)
    # An empty response leaves the prompt's tokens and END, which is cut off again.
    prompt_ids = [
        ids_T[:length].tolist()
        for ids_T, length in zip(encoded.input_ids_BT, (encoded.attention_mask_BT.sum(1) - 1).tolist(), strict=True)
    ]
    head = output_head(lm)
    training = lm.model.training
    lm.model.eval()
    order = sorted(range(len(rows)), key=lambda index: (len(prompt_ids[index]), index))
    answers: list[str] = [""] * len(rows)
    done = 0

    def on_ended(ended: int) -> None:
        if on_rows:
            on_rows(done + ended, len(rows))

    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            prompts_B = [prompt_ids[index] for index in chosen]
            new_ids = _continue(lm, head, prompts_B, max_new_tokens, choose, on_ended=on_ended)
            texts = lm.tokenizer.batch_decode(new_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for index, text in zip(chosen, texts, strict=True):
                answers[index] = text
            done += len(chosen)
    finally:
        lm.model.train(training)
    return answers


def _continue(
    lm: LanguageModel,
    head: Head,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    choose: _Choose,
    *,
    on_ended: Callable[[int], None],
) -> list[list[int]]:
    """Continue every prompt until its end token; finished rows leave the batch. After each token `on_ended` is told how
    many have ended; after the last one, all."""
    stop = _stop_ids(lm)
    takes_positions = "position_ids" in inspect.signature(lm.decoder.forward).parameters
    ids_BT, mask_BT = _pad_left(prompts, lm.table.end_id, lm.device)
    new_ids: list[list[int]] = [[] for _ in prompts]
    running = list(range(len(prompts)))
    cache = DynamicCache(config=lm.base.config)
    for taken in range(1, max_new_tokens + 1):
        extra = {}
        if takes_positions:
            extra["position_ids"] = (mask_BT.cumsum(1) - 1).clamp(min=0)[:, -ids_BT.shape[1] :]
        hidden_BTD = lm.decoder(
            input_ids=ids_BT, attention_mask=mask_BT, past_key_values=cache, use_cache=True, return_dict=True, **extra
        ).last_hidden_state
        next_B = choose(logits(hidden_BTD[:, -1], head))
        kept: list[int] = []
        for place, (row, token) in enumerate(zip(running, next_B.tolist(), strict=True)):
            if token not in stop:
                new_ids[row].append(token)
                kept.append(place)
        on_ended(len(prompts) - len(kept) if taken < max_new_tokens else len(prompts))
        if not kept:
            break
        if len(kept) < len(running):
            kept_B = torch.tensor(kept, device=mask_BT.device)
            running = [running[place] for place in kept]
            next_B, mask_BT = next_B[kept_B], mask_BT[kept_B]
            cache.batch_select_indices(kept_B)
        ids_BT = next_B[:, None]
        mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(mask_BT), 1)], 1)
    return new_ids


def _stop_ids(lm: LanguageModel) -> set[int]:
    """The end of turn, and what else the model's own generation settings stop at."""
    configured = getattr(lm.base.generation_config, "eos_token_id", None)
    ends = configured if isinstance(configured, list) else [] if configured is None else [configured]
    return {lm.table.end_id, *ends}


def _pad_left(rows: Sequence[Sequence[int]], fill: int, device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(1, *(len(row) for row in rows))
    ids_BT = torch.full((len(rows), width), fill, dtype=torch.int64)
    mask_BT = torch.zeros(len(rows), width, dtype=torch.int64)
    for place, row in enumerate(rows):
        if row:
            ids_BT[place, -len(row) :] = torch.tensor(row)
        mask_BT[place, width - max(len(row), 1) :] = 1  # an empty prompt starts from the end token
    return ids_BT.to(device), mask_BT.to(device)
