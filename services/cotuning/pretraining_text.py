"""Texts as the batches that pretraining reads: one a row of the batch, or packed into windows without padding.

Names: B rows of a batch, T tokens of a row, W windows.
"""

import random
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

_ENCODED_AT_ONCE = 512
_POOL_BATCHES = 16
PADDING, PROMPT, TEXT = 0, 1, 2
"""What a token of a window is part of."""


@dataclass(frozen=True)
class TrainingText:
    """A text to learn. `prompt` is read before it and learned with a lower weight; empty for running text."""

    prompt: str
    text: str


@dataclass(frozen=True)
class Batch:
    """What a step reads.

    Attributes:
        ids_BT: token ids, int64.
        weights_BT: of each token in the loss, as the one to be predicted; 0 on padding.
        num_tokens: without padding.
    """

    ids_BT: Tensor
    weights_BT: Tensor
    num_tokens: int


@dataclass(frozen=True)
class _Encoded:
    ids: list[int]
    num_prompt: int
    """Tokens that end within the prompt; they come first."""


class SimilarLengths:
    """Batches of one text a row, cut to `max_length` tokens, padded on the right; texts of like length together."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, texts: Sequence[TrainingText], *, max_length: int, cut_up: bool
    ) -> None:
        """`cut_up`: what is longer than `max_length` becomes several texts; else it loses its end."""
        encoded = _encode(tokenizer, texts)
        pieces = (piece for each in encoded for piece in (_pieces(each, max_length) if cut_up else [each]))
        self._texts = [_Encoded(each.ids[:max_length], each.num_prompt) for each in pieces]
        self._pad_id = int(tokenizer.pad_token_id)

    def __len__(self) -> int:
        return len(self._texts)

    def batches(self, batch_size: int, prompt_weight: float, order: random.Random) -> Iterator[Batch]:
        """Endless batches, epoch after epoch: little padding, every text once an epoch."""
        while self._texts:
            shuffled = order.sample(self._texts, len(self._texts))
            batches: list[list[_Encoded]] = []
            for start in range(0, len(shuffled), _POOL_BATCHES * batch_size):
                alike = iter(
                    sorted(shuffled[start : start + _POOL_BATCHES * batch_size], key=lambda each: len(each.ids))
                )
                while batch := list(islice(alike, batch_size)):
                    batches.append(batch)
            order.shuffle(batches)
            yield from (self._padded(batch, prompt_weight) for batch in batches)

    def _padded(self, batch: list[_Encoded], prompt_weight: float) -> Batch:
        length = max(len(row.ids) for row in batch)
        ids_BT = torch.tensor([row.ids + [self._pad_id] * (length - len(row.ids)) for row in batch])
        weights = [
            [prompt_weight] * row.num_prompt + [1.0] * (len(row.ids) - row.num_prompt) + [0.0] * (length - len(row.ids))
            for row in batch
        ]
        weights_BT = torch.tensor([each[:length] for each in weights])
        return Batch(ids_BT, weights_BT, sum(len(row.ids) for row in batch))


class Windows:
    """Batches of windows that texts fill to the brim. A text sees those before it in its window: no mask divides them,
    only the end-of-text token does, so that attention runs without a mask.

    Attributes:
        ids_WT: int32.
        parts_WT: uint8: `PADDING`, `PROMPT` or `TEXT`.
    """

    def __init__(self, ids_WT: Tensor, parts_WT: Tensor) -> None:
        self.ids_WT = ids_WT
        self.parts_WT = parts_WT

    @classmethod
    def of_documents(cls, tokenizer: PreTrainedTokenizerFast, documents: Iterable[str], *, length: int) -> "Windows":
        """One stream of all documents, each with its end, cut every `length` tokens; an unfilled last window is
        dropped, unless it is the only one."""
        stream = token_stream(tokenizer, documents)
        num_windows = len(stream) // length
        if not num_windows and len(stream) > 1:
            return cls._laid_out([[_Encoded(stream.tolist(), 0)]], int(tokenizer.pad_token_id), length)
        ids_WT = stream[: num_windows * length].view(num_windows, length)
        return cls(ids_WT, torch.full(ids_WT.shape, TEXT, dtype=torch.uint8))

    @classmethod
    def of_rows(cls, tokenizer: PreTrainedTokenizerFast, rows: Sequence[TrainingText], *, length: int) -> "Windows":
        """Whole rows together, best fit first, longest first; those longer than a window lose their end."""
        encoded = [_Encoded(each.ids[:length], each.num_prompt) for each in _encode(tokenizer, rows)]
        return cls._laid_out(_best_fit(encoded, length), int(tokenizer.pad_token_id), length)

    @classmethod
    def _laid_out(cls, windows: Sequence[Sequence[_Encoded]], pad_id: int, length: int) -> "Windows":
        ids_WT = torch.full((len(windows), length), pad_id, dtype=torch.int32)
        parts_WT = torch.full((len(windows), length), PADDING, dtype=torch.uint8)
        for window, rows in enumerate(windows):
            start = 0
            for row in rows:
                stop = start + len(row.ids)
                ids_WT[window, start:stop] = torch.tensor(row.ids, dtype=torch.int32)
                parts_WT[window, start:stop] = TEXT
                parts_WT[window, start : min(start + row.num_prompt, stop)] = PROMPT
                start = stop
        return cls(ids_WT, parts_WT)

    def __len__(self) -> int:
        return len(self.ids_WT)

    def batches(self, batch_size: int, prompt_weight: float, order: random.Random) -> Iterator[Batch]:
        """Endless batches, epoch after epoch, every window once an epoch; the last batch of an epoch may be smaller."""
        weight_P = torch.tensor([0.0, prompt_weight, 1.0])
        while len(self):
            shuffled = order.sample(range(len(self)), len(self))
            for start in range(0, len(shuffled), batch_size):
                chosen_B = torch.tensor(shuffled[start : start + batch_size])
                parts_BT = self.parts_WT[chosen_B]
                num_tokens = int((parts_BT != PADDING).sum())
                yield Batch(self.ids_WT[chosen_B].long(), weight_P[parts_BT.long()], num_tokens)


def token_stream(tokenizer: PreTrainedTokenizerFast, documents: Iterable[str]) -> Tensor:
    """The ids of all documents one after the other, each followed by the end-of-text token: int32 [N]."""
    stream = array("i")
    remaining = iter(documents)
    while texts := list(islice(remaining, _ENCODED_AT_ONCE)):
        for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
            stream.extend(ids)
            stream.append(tokenizer.eos_token_id)
    return torch.frombuffer(stream, dtype=torch.int32) if stream else torch.zeros(0, dtype=torch.int32)


def _encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[TrainingText]) -> Iterator[_Encoded]:
    """Prompt and text in one, as a prompt is read in use; then the end-of-text token."""
    for start in range(0, len(texts), _ENCODED_AT_ONCE):
        some = texts[start : start + _ENCODED_AT_ONCE]
        encoding = tokenizer(
            [each.prompt + each.text for each in some],
            return_offsets_mapping=True,
            add_special_tokens=False,
            verbose=False,
        )
        for text, ids, offsets in zip(some, encoding["input_ids"], encoding["offset_mapping"], strict=True):
            num_prompt = sum(end <= len(text.prompt) for _, end in offsets)
            yield _Encoded([*ids, tokenizer.eos_token_id], num_prompt)


def _pieces(document: _Encoded, length: int) -> Iterator[_Encoded]:
    for start in range(0, len(document.ids), length):
        piece = document.ids[start : start + length]
        if len(piece) > 1:
            yield _Encoded(piece, min(max(document.num_prompt - start, 0), len(piece)))


def _best_fit(rows: Sequence[_Encoded], length: int) -> list[list[_Encoded]]:
    """Each row, the longest first, into the fullest window that still has room for it."""
    windows: list[list[_Encoded]] = []
    with_room: list[list[int]] = [[] for _ in range(length + 1)]
    for row in sorted(rows, key=lambda each: -len(each.ids)):
        size = len(row.ids)
        room = next((room for room in range(size, length + 1) if with_room[room]), None)
        if room is None:
            window, room = len(windows), length
            windows.append([])
        else:
            window = with_room[room].pop()
        windows[window].append(row)
        with_room[room - size].append(window)
    return windows
