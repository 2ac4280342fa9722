"""Folding: every id in exactly one class, both sides in the same one where they read the same text."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cotuning.alignment import align, encode_batch
from cotuning.folding import class_agreement, fold_pair
from cotuning.token_tables import token_table
from tests.cotuning.trained_tokenizers import KINDS, SENTENCES, table_of, trained

SEEDS = (0, 1, 2)


def fold(kind_a: str, seed_a: int, kind_b: str, seed_b: int):
    return fold_pair(
        trained(kind_a, seed_a), table_of(kind_a, seed_a), trained(kind_b, seed_b), table_of(kind_b, seed_b)
    )


def characters_and(merges: list[tuple[str, str]], specials: list[str], letters: str = "0123456789ab") -> object:
    """A BPE over single characters with the given merges, without any normalisation."""
    pieces = [*specials, *letters, *(left + right for left, right in merges)]
    raw = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=merges))
    raw.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=specials[0])
    tokenizer.add_special_tokens({"additional_special_tokens": specials[1:]})
    return tokenizer


def test_a_hand_worked_pair():
    """`201` of one side begins with the other's `2`; `20` and `ab` are shared; `ba` begins with `b`."""
    a = characters_and([("2", "0"), ("20", "1"), ("a", "b")], ["<e>", "<x>"])
    b = characters_and([("0", "1"), ("a", "b"), ("b", "a")], ["<end>", "<pad>", "<s>"])
    table_a, table_b = token_table(a), token_table(b)
    pair = fold_pair(a, table_a, b, table_b)
    id_a, id_b = a.convert_tokens_to_ids, b.convert_tokens_to_ids
    assert pair.num_shared == 13  # twelve letters and "ab"
    assert pair.map_a_V[id_a("201")] == pair.map_b_V[id_b("2")]
    assert pair.map_a_V[id_a("20")] == pair.map_b_V[id_b("2")]
    assert pair.map_b_V[id_b("01")] == pair.map_a_V[id_a("0")]
    assert pair.map_a_V[id_a("ab")] == pair.map_b_V[id_b("ab")]
    assert pair.map_b_V[id_b("ba")] == pair.map_a_V[id_a("b")]
    assert pair.map_a_V[id_a("<e>")] == pair.map_b_V[id_b("<end>")] == pair.end_class
    assert pair.map_a_V[id_a("<x>")] == pair.map_b_V[id_b("<s>")] == pair.map_b_V[id_b("<pad>")] == pair.other_class
    assert pair.num_classes == 15


def test_a_chain_of_first_pieces_is_followed_to_a_shared_one():
    """`abab` -> the other's `aba` -> this side's `ab`, which is not shared -> the other's `a`."""
    a = characters_and([("a", "b"), ("ab", "ab")], ["<e>"], letters="ab")
    b = characters_and([("b", "a"), ("a", "ba")], ["<e>"], letters="ab")
    pair = fold_pair(a, token_table(a), b, token_table(b))
    first = b("abab")["input_ids"][0]
    assert b.convert_ids_to_tokens(first) == "aba"
    assert pair.map_a_V[a.convert_tokens_to_ids("abab")] == pair.map_b_V[first]
    assert pair.map_a_V[a.convert_tokens_to_ids("ab")] == pair.map_b_V[b.convert_tokens_to_ids("a")]
    assert pair.map_b_V[first] == pair.map_b_V[b.convert_tokens_to_ids("a")]


def test_without_specials_on_one_side_theirs_join_end_so_that_every_class_can_be_reached():
    a = characters_and([("a", "b")], ["<e>"])
    b = characters_and([("b", "a")], ["<e>", "<pad>"])
    pair = fold_pair(a, token_table(a), b, token_table(b))
    assert pair.other_class == pair.end_class
    assert pair.map_b_V[b.convert_tokens_to_ids("<pad>")] == pair.end_class


@pytest.mark.parametrize("kind_a", KINDS)
@pytest.mark.parametrize("kind_b", KINDS)
def test_every_class_is_reached_from_both_sides_and_swapping_swaps_the_maps(kind_a, kind_b):
    pair, swapped = fold(kind_a, 0, kind_b, 1), fold(kind_b, 1, kind_a, 0)
    for map_V in (pair.map_a_V, pair.map_b_V):
        assert torch.equal(map_V.unique(), torch.arange(pair.num_classes))
    assert torch.equal(pair.map_a_V, swapped.map_b_V)
    assert torch.equal(pair.map_b_V, swapped.map_a_V)
    assert pair.num_classes == swapped.num_classes
    again = fold(kind_a, 0, kind_b, 1)
    assert pair.fingerprint == again.fingerprint
    assert pair.fingerprint != swapped.fingerprint
    assert not pair.identical
    for table, map_V in ((table_of(kind_a, 0), pair.map_a_V), (table_of(kind_b, 1), pair.map_b_V)):
        assert map_V[table.end_id] == pair.end_class
        assert int((map_V == pair.end_class).sum()) == 1 or pair.end_class == pair.other_class


@pytest.mark.parametrize("kind", KINDS)
def test_equal_tables_are_not_folded(kind):
    pair = fold(kind, 0, kind, 0)
    assert pair.identical
    assert torch.equal(pair.map_a_V, torch.arange(table_of(kind).num_tokens))
    assert pair.num_classes == table_of(kind).num_tokens


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(KINDS), st.sampled_from(KINDS), st.sampled_from(SEEDS), st.integers(0, 2**31))
def test_the_pushforward_is_a_distribution(kind_a, kind_b, seed_a, draw):
    pair = fold(kind_a, seed_a, kind_b, 1)
    generator = torch.Generator().manual_seed(draw)
    probs_V = torch.randn(len(pair.map_a_V), generator=generator, dtype=torch.float64).mul(3).softmax(0)
    folded_M = torch.zeros(pair.num_classes, dtype=torch.float64).index_add_(0, pair.map_a_V, probs_V)
    assert torch.isclose(folded_M.sum(), torch.ones((), dtype=torch.float64), atol=1e-12)
    assert (folded_M > 0).all()


@pytest.mark.parametrize(
    ("kind_a", "kind_b", "least"),
    [
        ("byte_level", "byte_level", 0.97),
        ("byte_level", "byte_fallback", 0.97),
        ("byte_level", "unigram", 0.93),
        ("byte_fallback", "unigram", 0.93),
        ("byte_level", "word_piece", 0.80),  # case and white space tell apart here what they do not there
        ("unigram", "word_piece", 0.80),
    ],
)
def test_first_tokens_of_spans_fall_in_the_same_class(kind_a, kind_b, least):
    prompts = ["Q:\n"] * len(SENTENCES)
    a = encode_batch(trained(kind_a, 0), table_of(kind_a, 0), prompts, SENTENCES, max_length=512)
    b = encode_batch(trained(kind_b, 1), table_of(kind_b, 1), prompts, SENTENCES, max_length=512)
    assert class_agreement(align(a, b), fold(kind_a, 0, kind_b, 1)) >= least


def test_agreement_counts_text_spans_only():
    a = encode_batch(trained("byte_level"), table_of("byte_level"), ["Q:\n"], [""], max_length=64)
    b = encode_batch(trained("unigram"), table_of("unigram"), ["Q:\n"], [""], max_length=64)
    assert class_agreement(align(a, b), fold("byte_level", 0, "unigram", 0)) == 1.0
