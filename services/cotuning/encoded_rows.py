"""Rows of data encoded once for one tokenizer, and batches cut from them.

Names: B rows of a batch, T tokens.
"""

from collections.abc import Iterable, Sequence
from dataclasses import fields

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cotuning.encoding import IGNORED_LABEL, EncodedBatch, encode_batch
from cotuning.examples import Example, render_prompt
from cotuning.vocabulary import Reads

_ROWS_AT_ONCE = 256


class EncodedRows:
    """Examples as one model reads them; each is tokenized once, when it is first drawn.

    Args:
        lm: whose tokenizer and device; a `Vocabulary` will do.
        examples: all rows.
        max_length: tokens a row.
    """

    def __init__(self, lm: Reads, examples: Sequence[Example], *, max_length: int) -> None:
        self.examples = examples
        self.lm = lm
        self._max_length = max_length
        self._fill = {"input_ids_BT": lm.table.end_id, "labels_BT": IGNORED_LABEL}
        self._device = lm.device
        self._rows: dict[int, EncodedBatch] = {}

    def encode(self, indices: Iterable[int]) -> None:
        """Tokenize those of the rows that were not yet: many in one call are much faster than one by one."""
        missing = sorted(set(indices) - self._rows.keys())
        for start in range(0, len(missing), _ROWS_AT_ONCE):
            wanted = missing[start : start + _ROWS_AT_ONCE]
            chosen = [self.examples[index] for index in wanted]
            prompts = [render_prompt(self.lm.tokenizer, example) for example in chosen]
            responses = [example.output for example in chosen]
            encoded = encode_batch(self.lm.tokenizer, self.lm.table, prompts, responses, max_length=self._max_length)
            for place, index in enumerate(wanted):
                self._rows[index] = _cut(encoded, place)

    def batch(self, indices: Sequence[int]) -> EncodedBatch:
        """The rows at `indices`, in that order, right-padded to the longest of them, on the model's device."""
        self.encode(indices)
        rows = [self._rows[index] for index in indices]
        joined: dict[str, Tensor] = {}
        for field in fields(EncodedBatch):
            values = [getattr(row, field.name)[0] for row in rows]
            if field.name.endswith("_BT"):
                fill = self._fill.get(field.name, 0)
                joined[field.name] = pad_sequence(values, batch_first=True, padding_value=fill)
            else:
                joined[field.name] = torch.stack(values)
        batch = EncodedBatch(**joined)
        return batch if self._device.type == "cpu" else batch.to(self._device)


def _cut(encoded: EncodedBatch, place: int) -> EncodedBatch:
    """One row without its padding, in memory of its own."""
    length = int(encoded.attention_mask_BT[place].sum())
    values: dict[str, Tensor] = {}
    for field in fields(EncodedBatch):
        row = getattr(encoded, field.name)[place : place + 1]
        values[field.name] = (row[:, :length] if field.name.endswith("_BT") else row).clone()
    return EncodedBatch(**values)
