"""How good a model is on rows with known answers: greedy answers against references, and bits a byte.

Names: B rows of a batch, T tokens, D hidden size, N response tokens.

Generation is a loop of our own: rows of like length together, prompts padded on the left, one cache, the head on the
last position only. It gives what `transformers`' greedy `generate` gives row by row, without its per-token overhead,
which for small models is most of the time.
"""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from cotuning.cross_entropy import cross_entropy, response_tokens
from cotuning.encoded_rows import EncodedRows
from cotuning.encoding import encode_batch
from cotuning.examples import Example, render_prompt
from cotuning.heads import Head
from cotuning.language_model import LanguageModel, hidden_states, logits, output_head

DEFAULT_MAX_LENGTH = 512


@dataclass(frozen=True)
class Scores:
    """Quality of one model on one set of rows.

    Attributes:
        rouge_l: mean F-measure, 0-100.
        exact_match: share of answers equal to a reference, lower-cased and trimmed, 0-100.
        bits_per_byte: all bits over all bytes of the responses, so that tokenizers can be compared; END's bits count,
            and of a response that was truncated only what was read.
        num_rows: rows measured.
    """

    rouge_l: float
    exact_match: float
    bits_per_byte: float
    num_rows: int


def evaluate(
    lm: LanguageModel,
    rows: Sequence[Example],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    max_length: int = DEFAULT_MAX_LENGTH,
) -> Scores:
    """Measure `lm`, as it stands with its active adapters, on `rows`.

    Args:
        rows: at least one.
        max_new_tokens: longest answer.
        batch_size: rows at a time.
        max_length: tokens of prompt and response; what is longer loses its prompt's head.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("expected at least one row to evaluate on, got none")
    # Late: `evaluate` imports all of transformers' pipelines, seconds that a process which only trains need not spend.
    from cotuning.metrics.exact_match import ExactMatch
    from cotuning.metrics.rouge_l import RougeL

    answers = generate(lm, rows, max_new_tokens=max_new_tokens, batch_size=batch_size, max_length=max_length)
    accepted = [list(row.accepted) for row in rows]
    rouge_l = RougeL().compute(predictions=answers, references=accepted)
    exact_match = ExactMatch().compute(predictions=answers, references=accepted)
    return Scores(
        rouge_l=float(rouge_l["rouge_l"]),
        exact_match=float(exact_match["exact_match"]),
        bits_per_byte=bits_per_byte(lm, rows, batch_size=batch_size, max_length=max_length),
        num_rows=len(rows),
    )


@torch.no_grad()
def bits_per_byte(
    lm: LanguageModel, rows: Sequence[Example], *, batch_size: int = 64, max_length: int = DEFAULT_MAX_LENGTH
) -> float:
    """Bits that the model needs for the responses (`output`) and their ends, over the responses' UTF-8 bytes."""
    encoded = EncodedRows(lm, rows, max_length=max_length)
    head = output_head(lm)
    order = sorted(range(len(rows)), key=lambda index: (_size(rows[index]), index))
    nats = 0.0
    num_bytes = 0
    for start in range(0, len(order), batch_size):
        batch = encoded.batch(order[start : start + batch_size])
        tokens = response_tokens(batch)
        hidden_BTD = hidden_states(lm, batch.input_ids_BT)
        _, losses_N = cross_entropy(hidden_BTD[tokens.sample_N, tokens.position_N], head, tokens.target_N)
        nats += float(losses_N.double().sum())
        read_B = torch.where(batch.end_position_B >= 0, batch.num_bytes_B, batch.byte_ends_BT.amax(1))
        num_bytes += int(read_B.sum())
    return nats / math.log(2) / max(num_bytes, 1)


@torch.no_grad()
def generate(
    lm: LanguageModel,
    rows: Sequence[Example],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    max_length: int = DEFAULT_MAX_LENGTH,
) -> list[str]:
    """The model's greedy answers, in the order of `rows`; each stops before the end token."""
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
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        new_ids = _greedy(lm, head, [prompt_ids[index] for index in chosen], max_new_tokens)
        texts = lm.tokenizer.batch_decode(new_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for index, text in zip(chosen, texts, strict=True):
            answers[index] = text
    lm.model.train(training)
    return answers


def _greedy(lm: LanguageModel, head: Head, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
    """Continue every prompt until its end token; finished rows leave the batch."""
    stop = _stop_ids(lm)
    takes_positions = "position_ids" in inspect.signature(lm.decoder.forward).parameters
    ids_BT, mask_BT = _pad_left(prompts, lm.table.end_id, lm.device)
    new_ids: list[list[int]] = [[] for _ in prompts]
    running = list(range(len(prompts)))
    cache = DynamicCache(config=lm.base.config)
    for _ in range(max_new_tokens):
        extra = {}
        if takes_positions:
            extra["position_ids"] = (mask_BT.cumsum(1) - 1).clamp(min=0)[:, -ids_BT.shape[1] :]
        hidden_BTD = lm.decoder(
            input_ids=ids_BT, attention_mask=mask_BT, past_key_values=cache, use_cache=True, return_dict=True, **extra
        ).last_hidden_state
        next_B = logits(hidden_BTD[:, -1], head).argmax(-1)
        kept: list[int] = []
        for place, (row, token) in enumerate(zip(running, next_B.tolist(), strict=True)):
            if token not in stop:
                new_ids[row].append(token)
                kept.append(place)
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


def _size(row: Example) -> int:
    return len(row.instruction) + len(row.input) + len(row.output)
