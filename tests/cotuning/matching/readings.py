"""Two readings of the same responses under real tokenizers and random models, and slow arithmetic on them."""

import math
from dataclasses import dataclass, replace

import torch

from cotuning.alignment import encode_batch
from cotuning.encoding import EncodedBatch
from cotuning.heads import Head
from cotuning.matching.interface import Reading
from tests.cotuning.trained_tokenizers import table_of, trained

RESPONSES = ("The unit of international measurement", "the dog sleeps on many models", "é fox")
PROMPTS = ("Say it again:\n", "Q:\n", "A longer prompt than the others have, so that rows are of unlike shape.\n")
KIND_A, KIND_B = "byte_level", "byte_fallback"


@dataclass(frozen=True)
class Token:
    """One response token: where it stands, its id and its bytes (none for END)."""

    position: int
    index: int
    piece: bytes


def reading(
    kind: str,
    *,
    seed: int,
    responses: tuple[str, ...] = RESPONSES,
    dim: int = 3,
    scale: float = 2.0,
    grad: bool = False,
    max_length: int = 64,
) -> Reading:
    """Random float64 hidden states and a random head, two rows wider than the tokenizer."""
    table = table_of(kind)
    batch = encode_batch(trained(kind), table, PROMPTS[: len(responses)], responses, max_length=max_length)
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*batch.input_ids_BT.shape, dim, generator=generator, dtype=torch.float64)
    weight = torch.randn(table.num_tokens + 2, dim, generator=generator, dtype=torch.float64) * scale
    return Reading(batch, hidden.requires_grad_(grad), Head(weight.requires_grad_(grad), table.num_tokens))


def pair(grad: bool = False, **options: object) -> tuple[Reading, Reading]:
    return reading(KIND_A, seed=1, grad=grad, **options), reading(KIND_B, seed=2, dim=4, grad=grad, **options)  # type: ignore[arg-type]


def padded(one: Reading, columns: int) -> Reading:
    """The same rows with more padding, under which the hidden states are garbage."""
    batch, hidden = one.batch, one.hidden_BTD
    fills = {"input_ids_BT": int(batch.input_ids_BT[0, -1]), "labels_BT": -100}
    wider = {
        name: torch.nn.functional.pad(getattr(batch, name), (0, columns), value=fills.get(name, 0))
        for name in EncodedBatch.__dataclass_fields__
        if name.endswith("_BT")
    }
    garbage = torch.full((len(hidden), columns, hidden.shape[2]), 1e3, dtype=hidden.dtype)
    return replace(one, batch=replace(batch, **wider), hidden_BTD=torch.cat([hidden, garbage], 1))


def tokens_of(one: Reading, kind: str, row: int, response: str) -> list[Token]:
    """The response tokens of a row, END with no bytes; the others spell the response."""
    pieces = table_of(kind).pieces
    positions = (one.batch.labels_BT[row] != -100).nonzero().flatten().tolist()
    tokens = [
        Token(place, int(one.batch.input_ids_BT[row, place]), pieces[int(one.batch.input_ids_BT[row, place])] or b"")
        for place in positions
    ]
    assert b"".join(token.piece for token in tokens) == response.encode()
    return tokens


def probs_before(one: Reading, row: int, token: Token, temperature: float = 1.0) -> list[float]:
    """The softened distribution that predicts `token`: read one position before it."""
    hidden = one.hidden_BTD[row, token.position - 1].tolist()
    logits = [
        sum(h * w for h, w in zip(hidden, weights, strict=True)) / temperature
        for weights in one.head.weight_VD[: one.head.num_tokens].tolist()
    ]
    highest = max(logits)
    total = sum(math.exp(logit - highest) for logit in logits)
    return [math.exp(logit - highest) / total for logit in logits]


def walk_spans(tokens_a: list[Token], tokens_b: list[Token]) -> list[tuple[list[Token], list[Token]]]:
    """Groups of the same text, found by walking both sides; the two ENDs are the last group."""
    groups, group_a, group_b = [], [], []
    left_a, left_b = tokens_a[:-1], tokens_b[:-1]
    end_a = end_b = 0
    while left_a or left_b:
        if end_a <= end_b and left_a:
            group_a.append(left_a[0])
            end_a += len(left_a.pop(0).piece)
        else:
            group_b.append(left_b[0])
            end_b += len(left_b.pop(0).piece)
        if end_a == end_b:
            groups.append((group_a, group_b))
            group_a, group_b = [], []
    return [*groups, (tokens_a[-1:], tokens_b[-1:])]


def span_groups(a: Reading, b: Reading) -> list[tuple[int, list[Token], list[Token]]]:
    """All rows' groups, with the row."""
    return [
        (row, *group)
        for row, response in enumerate(RESPONSES)
        for group in walk_spans(tokens_of(a, KIND_A, row, response), tokens_of(b, KIND_B, row, response))
    ]
