"""Alignment: tokens a second from ids to spans against TRL's GOLD and against warping, growth, and class agreement.

`make bench-alignment`. GOLD's own code comes from the `bench` extra; without it that part says so and is left out.
"""

import argparse
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from benchmarks.corpus import VOCABULARY_SIZES, held_out, tokenizer
from benchmarks.dynamic_time_warping import warp
from benchmarks.measuring import Goal, compare, print_goals, print_table, write_results
from cotuning.alignment import Alignment, align
from cotuning.encoding import EncodedBatch, byte_ends, encode_batch
from cotuning.folding import class_agreement, fold_pair, other_share
from cotuning.token_tables import TokenTable, token_table

_PROMPT = "Q:\n"
_MAX_LENGTH = 1 << 16
_PAIR = ("bpe_single_digits", "bpe_whole_numbers")
_ROWS = 64
_WARPED_ROWS = 2


@dataclass(frozen=True)
class Side:
    """One tokenizer's reading of the responses, N tokens in all.

    Attributes:
        ids_N, lengths_B: the tokens of all rows one after the other, and how many each row has.
        batch: the same, laid out.
        table: the tokenizer's.
    """

    ids_N: Tensor
    lengths_B: Tensor
    batch: EncodedBatch
    table: TokenTable

    @property
    def num_tokens(self) -> int:
        """N."""
        return len(self.ids_N)


def read(kind: str, responses: Sequence[str]) -> Side:
    """Encode the responses with one of the benchmark's tokenizers."""
    table = token_table(tokenizer(kind))
    batch = encode_batch(tokenizer(kind), table, [_PROMPT] * len(responses), responses, max_length=_MAX_LENGTH)
    return Side(batch.input_ids_BT[batch.content_mask_BT], batch.content_mask_BT.sum(1), batch, table)


def from_ids(a: Side, b: Side) -> Alignment:
    """What is timed: byte ends from the static table by cumulative sum, boundaries, spans."""
    for side in (a, b):
        byte_ends(side.table.byte_lengths_V.index_select(0, side.ids_N), side.lengths_B, side.batch.num_bytes_B)
    return align(a.batch, b.batch)


def gold(responses: Sequence[str]) -> Callable[[], object] | None:
    """GOLD's work between tokenization and loss, byte offsets from character offsets and the walk; None without TRL."""
    try:
        utilities = importlib.import_module("trl.experimental.utils")
        walk = importlib.import_module("trl.experimental.gold.gold_trainer").ULDLoss._align_by_byte_offsets
    except ImportError:
        return None
    normalize = utilities._normalize_byte_offsets
    sides = [
        [(text, one.offsets, one.tokens) for text, one in zip(responses, encodings, strict=True)]
        for encodings in (tokenizer(kind).backend_tokenizer.encode_batch(list(responses)) for kind in _PAIR)
    ]

    def offsets(text: str, spans: Sequence[tuple[int, int]], tokens: Sequence[str]) -> Any:
        # The conversion of trl.experimental.utils.encode_with_byte_offsets, which cannot be called without tokenizing.
        before = [0]
        for character in text:
            before.append(before[-1] + len(character.encode()))
        return normalize([(before[start], before[end]) for start, end in spans], tokens, text.encode())

    def run() -> list[Any]:
        return [walk(offsets(*first), offsets(*second)) for first, second in zip(*sides, strict=True)]

    return run


def speeds(repeats: int) -> tuple[dict[str, Any], list[Goal]]:
    """Against GOLD on the same responses, and against warping, by tokens a second, on some of them."""
    responses = held_out(_ROWS)
    a, b = (read(kind, responses) for kind in _PAIR)
    tokens = a.num_tokens + b.num_tokens
    results: dict[str, Any] = {"pair": _PAIR, "rows": _ROWS, "tokens": tokens}
    goals: list[Goal] = []

    def against(name: str, peer: Callable[[], object], share: float, limit: float) -> None:
        timings = compare({"peer": peer, "ours": lambda: from_ids(a, b)}, repeats)
        ours, ratio = timings["ours"], timings["ours"].speed_ratio / share
        results[name] = {
            "tokens_a_second": tokens * share / timings["peer"].seconds,
            "ours_tokens_a_second": tokens / ours.seconds,
            "ratio": ratio,
            "ratio_quartiles": [each / share for each in ours.speed_quartiles],
        }
        goals.append(Goal(f"ids to spans against {name}", ratio, limit, at_least=True))

    walk = gold(responses)
    if walk is None:
        print("trl cannot be imported (pip install 'cotune[bench]'): no comparison with GOLD")
    else:
        against("GOLD's offsets and walk", walk, 1.0, 50)
    pieces = [[tokenizer(kind).tokenize(text) for text in responses[:_WARPED_ROWS]] for kind in _PAIR]
    share = sum(len(tokens) for side in pieces for tokens in side) / tokens
    against("warping with edit distance", lambda: [warp(*each) for each in zip(*pieces, strict=True)], share, 1000)
    whole = compare({"ours": lambda: encode_only(responses), "again": lambda: encode_only(responses)}, 3)
    results["tokenization, byte ends, verification and layout, tokens a second"] = tokens / whole["ours"].seconds
    return results, goals


def encode_only(responses: Sequence[str]) -> list[EncodedBatch]:
    """Everything before `align`, the tokenizers' own time included."""
    return [read(kind, responses).batch for kind in _PAIR]


def growth(repeats: int) -> tuple[dict[str, Any], list[Goal]]:
    """Time at 1,024 tokens a row over time at 512."""
    rows: dict[int, list[str]] = {512: [], 1024: []}
    long_texts = ["".join(pair) for pair in zip(held_out(4 * _ROWS)[::2], held_out(4 * _ROWS)[1::2], strict=True)]
    for text in long_texts:
        offsets = tokenizer(_PAIR[0]).backend_tokenizer.encode(text).offsets
        if len(offsets) >= 1024 and len(rows[512]) < _ROWS:
            for length, texts in rows.items():
                texts.append(text[: offsets[length - 1][1]])
    sides = {length: [read(kind, texts) for kind in _PAIR] for length, texts in rows.items()}
    timings = compare({str(length): (lambda pair=pair: from_ids(*pair)) for length, pair in sides.items()}, repeats)
    ratio = timings["1024"].time_ratio
    return {"rows": len(rows[512]), "time_ratio": ratio}, [
        Goal("time at 1,024 tokens a row over 512", ratio, 2.3, at_least=False)
    ]


def agreement() -> tuple[list[dict[str, Any]], list[Goal]]:
    """Whether the first tokens of spans fall in the same class, for every two of the tokenizers."""
    responses = held_out(_ROWS)
    rows: list[dict[str, Any]] = []
    for kinds in combinations(VOCABULARY_SIZES, 2):
        a, b = (read(kind, responses) for kind in kinds)
        tokenizers = [tokenizer(kind) for kind in kinds]
        fold = fold_pair(tokenizers[0], a.table, tokenizers[1], b.table)
        spans = align(a.batch, b.batch)
        after_break_S = fold.after_break(spans)
        rows.append(
            {
                "pair": " / ".join(kinds),
                "spans": spans.num_spans,
                "coverage": spans.coverage,
                "skipped": spans.num_skipped,
                "classes": fold.num_classes,
                "broken": 0.0 if after_break_S is None else float(after_break_S.double().mean()),
                "other": other_share(spans, fold),
                "agreement": class_agreement(spans, fold),
            }
        )
    lowest = min(row["agreement"] for row in rows)
    return rows, [Goal("class agreement of first tokens, lowest pair", lowest, 0.93, at_least=True, unit="")]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15, help="timed turns of each comparison")
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    pairs, agreement_goals = agreement()
    print_table("Pairs of tokenizers", list(pairs[0]), [list(row.values()) for row in pairs])
    speed, speed_goals = speeds(repeats)
    grown, growth_goals = growth(repeats)
    goals = speed_goals + growth_goals + agreement_goals
    print_goals("Alignment", goals)
    write_results(
        "alignment",
        {
            "speed": speed,
            "growth": grown,
            "pairs": pairs,
            "goals": [{"measure": goal.measure, "value": goal.value, "met": goal.met} for goal in goals],
        },
    )


if __name__ == "__main__":
    main()
