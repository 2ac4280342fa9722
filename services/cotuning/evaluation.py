"""How good a model is on rows with known answers: greedy answers against references, and bits a byte.

Names: B rows of a batch, T tokens, D hidden size, N response tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cotuning.cross_entropy import cross_entropy, response_tokens
from cotuning.encoded_rows import EncodedRows
from cotuning.examples import Example
from cotuning.generation import DEFAULT_MAX_LENGTH, OnRows, generate
from cotuning.language_model import LanguageModel, hidden_states, output_head


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


@dataclass(frozen=True)
class RowMeasurements:
    """What `Scores` are made of, row by row, in the order of the rows.

    Attributes:
        rouge_l: F-measure, 0-100.
        exact_match: whether the answer equals a reference, lower-cased and trimmed.
        bits: of the response and its END.
        num_bytes: UTF-8 bytes of the response that were read.
    """

    rouge_l: tuple[float, ...]
    exact_match: tuple[bool, ...]
    bits: tuple[float, ...]
    num_bytes: tuple[int, ...]

    @property
    def scores(self) -> Scores:
        """The scores over all rows."""
        num_rows = len(self.bits)
        return Scores(
            rouge_l=sum(self.rouge_l) / num_rows,
            exact_match=100.0 * sum(self.exact_match) / num_rows,
            bits_per_byte=sum(self.bits) / max(sum(self.num_bytes), 1),
            num_rows=num_rows,
        )


def evaluate(
    lm: LanguageModel,
    rows: Sequence[Example],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    max_length: int = DEFAULT_MAX_LENGTH,
    on_rows: OnRows | None = None,
) -> Scores:
    """Measure `lm`, as it stands with its active adapters, on `rows`.

    Args:
        rows: at least one.
        max_new_tokens: longest answer.
        batch_size: rows at a time.
        max_length: tokens of prompt and response; what is longer loses its prompt's head.
        on_rows: see `generation.OnRows`; every row is counted twice, when it is answered and when its response is read.

    Raises:
        ValueError: no rows.
        Exception: whatever `on_rows` raises.
    """
    return measure_rows(
        lm, rows, max_new_tokens=max_new_tokens, batch_size=batch_size, max_length=max_length, on_rows=on_rows
    ).scores


def measure_rows(
    lm: LanguageModel,
    rows: Sequence[Example],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    max_length: int = DEFAULT_MAX_LENGTH,
    on_rows: OnRows | None = None,
) -> RowMeasurements:
    """Measure `lm` as `evaluate` does, and keep each row's part. Arguments and errors are those of `evaluate`."""
    if not rows:
        raise ValueError("expected at least one row to evaluate on, got none")
    # Late: `evaluate` imports all of transformers' pipelines, seconds that a process which only trains need not spend.
    from cotuning.metrics.exact_match import ExactMatch
    from cotuning.metrics.rouge_l import RougeL

    def on_answered(done: int, _: int) -> None:
        if on_rows:
            on_rows(done, 2 * len(rows))

    def on_read(done: int, _: int) -> None:
        if on_rows:
            on_rows(len(rows) + done, 2 * len(rows))

    answers = generate(
        lm, rows, max_new_tokens=max_new_tokens, batch_size=batch_size, max_length=max_length, on_rows=on_answered
    )
    accepted = [list(row.accepted) for row in rows]
    rouge_l = RougeL().compute(predictions=answers, references=accepted)
    exact_match = ExactMatch().compute(predictions=answers, references=accepted)
    bits, num_bytes = _response_bits(lm, rows, batch_size=batch_size, max_length=max_length, on_rows=on_read)
    return RowMeasurements(tuple(rouge_l["each"]), tuple(exact_match["each"]), tuple(bits), tuple(num_bytes))


def bits_per_byte(
    lm: LanguageModel,
    rows: Sequence[Example],
    *,
    batch_size: int = 64,
    max_length: int = DEFAULT_MAX_LENGTH,
    on_rows: OnRows | None = None,
) -> float:
    """Bits that the model needs for the responses (`output`) and their ends, over the responses' UTF-8 bytes."""
    bits, num_bytes = _response_bits(lm, rows, batch_size=batch_size, max_length=max_length, on_rows=on_rows)
    return sum(bits) / max(sum(num_bytes), 1)


@torch.no_grad()
def _response_bits(
    lm: LanguageModel, rows: Sequence[Example], *, batch_size: int, max_length: int, on_rows: OnRows | None
) -> tuple[list[float], list[int]]:
    """Each row's bits, END's included, and bytes that were read."""
    encoded = EncodedRows(lm, rows, max_length=max_length)
    head = output_head(lm)
    order = sorted(range(len(rows)), key=lambda index: (_size(rows[index]), index))
    bits, num_bytes = [0.0] * len(rows), [0] * len(rows)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = encoded.batch(chosen)
        tokens = response_tokens(batch)
        hidden_BTD = hidden_states(lm, batch.input_ids_BT)
        _, losses_N = cross_entropy(hidden_BTD[tokens.sample_N, tokens.position_N], head, tokens.target_N)
        nats_B = torch.zeros(len(chosen), dtype=torch.float64)
        nats_B.index_add_(0, tokens.sample_N.cpu(), losses_N.double().cpu())
        read_B = torch.where(batch.end_position_B >= 0, batch.num_bytes_B, batch.byte_ends_BT.amax(1))
        for index, nats, read in zip(chosen, nats_B.tolist(), read_B.tolist(), strict=True):
            bits[index], num_bytes[index] = nats / math.log(2), read
        if on_rows:
            on_rows(min(start + batch_size, len(rows)), len(rows))
    return bits, num_bytes


def _size(row: Example) -> int:
    return len(row.instruction) + len(row.input) + len(row.output)
