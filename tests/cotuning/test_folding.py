"""Folding: every id in exactly one class, both sides in the same one where they read the same text."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cotuning.alignment import align, encode_batch
from cotuning.folding import class_agreement, fold_pair, other_share
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


@pytest.mark.parametrize("kind_a", KINDS)
@pytest.mark.parametrize("kind_b", KINDS)
@pytest.mark.parametrize(("seed_a", "seed_b"), [(0, 1), (1, 2), (2, 0)])
def test_first_tokens_of_spans_fall_in_the_same_class(kind_a, kind_b, seed_a, seed_b):
    """On every pair; and not because all fall in one class, nor in OTHER, nor because few spans are looked at."""
    spans = aligned(kind_a, kind_b, list(SENTENCES), seed_a, seed_b)
    pair = fold(kind_a, seed_a, kind_b, seed_b)
    assert class_agreement(spans, pair) >= 0.93
    assert other_share(spans, pair) <= 0.2, "emoji, Hangul and Cyrillic, which two of the kinds cannot write"
    assert spans.coverage > 0.99
    classes = pair.map_a_V[spans.first_token_a_S]
    shares = classes.unique(return_counts=True)[1].double() / len(classes)
    assert -(shares * shares.log2()).sum() > 4.5, "bits that the observed class still tells"


def aligned(kind_a: str, kind_b: str, texts: list[str], seed_a: int = 0, seed_b: int = 1):
    prompts = ["Q:\n"] * len(texts)
    a = encode_batch(trained(kind_a, seed_a), table_of(kind_a, seed_a), prompts, texts, max_length=512)
    b = encode_batch(trained(kind_b, seed_b), table_of(kind_b, seed_b), prompts, texts, max_length=512)
    return align(a, b)


def lower_casing_words(words: list[str]) -> object:
    raw = Tokenizer(models.WordPiece({piece: index for index, piece in enumerate(["[UNK]", "[SEP]", *words])}))
    raw.normalizer = normalizers.BertNormalizer(lowercase=True)
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]", sep_token="[SEP]")


def spelling_words(merges: list[tuple[str, str]]) -> object:
    raw = Tokenizer(models.BPE())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["<e>", *alphabet, *(left + right for left, right in merges)]
    raw.model = models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=merges)
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<e>")


def test_a_word_of_a_side_that_drops_spaces_has_two_classes():
    """`is` stands for " is" after a letter, one token of the other side, and for "i", "s" after a bracket."""
    a = lower_casing_words(["is", "##is", "i", "##s", "s", "(", ")", "##i"])
    b = spelling_words([("i", "s"), ("Ġ", "is")])
    b_apart = spelling_words([("Ġ", "i"), ("Ġi", "s")])
    for other, in_brackets in ((b, "is"), (b_apart, "i")):
        pair = fold_pair(a, token_table(a), other, token_table(other))
        assert pair.unspaced is not None
        is_a, is_b = a.convert_tokens_to_ids("is"), other.convert_tokens_to_ids("Ġis")
        assert pair.map_a_V[is_a] == pair.map_b_V[is_b]
        inside = other.convert_tokens_to_ids(in_brackets)
        assert pair.unspaced.map_a_V[is_a] == pair.unspaced.map_b_V[inside]
        assert pair.map_a_V[is_a] != pair.map_a_V[a.convert_tokens_to_ids("##is")]
        for part in (pair, pair.unspaced):
            bracket = a.convert_tokens_to_ids("("), other.convert_tokens_to_ids("(")
            assert part.map_a_V[bracket[0]] == part.map_b_V[bracket[1]] != part.other_class
        prompts, texts = ["?\n"], ["is (is is) is"]
        encoded = [encode_batch(each, token_table(each), prompts, texts, max_length=64) for each in (a, other)]
        spans = align(*encoded)
        assert class_agreement(spans, pair) == 1.0
        assert other_share(spans, pair) == 0.0
        words = [bool(broken) for broken, end in zip(pair.after_break(spans), spans.is_end_S, strict=True) if not end]
        assert words == [True, True, True, False, False, False], "before is ( is  is )  is: newline, space, (, s, s, )"


def test_pieces_between_which_a_mark_decides_are_one_class():
    """The Unigram side reads " self" as one piece but " self." as " ", "self.", the other side " self" both times."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -3.0), ("▁self", -5.0), ("self.", -4.0), (".", -6.0), ("▁dog", -5.0)]
    raw = Tokenizer(models.Unigram([*pieces, *((letter, -9.0) for letter in "selfdog")], unk_id=0))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    a = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", unk_token="<unk>")
    b = spelling_words([("s", "e"), ("l", "f"), ("se", "lf"), ("Ġ", "self"), ("d", "o"), ("do", "g"), ("Ġ", "dog")])
    assert a.tokenize(" self") == ["▁self"]
    assert a.tokenize(" self.") == ["▁", "self."]
    pair = fold_pair(a, token_table(a), b, token_table(b))
    merged = {int(pair.map_a_V[a.convert_tokens_to_ids(piece)]) for piece in ("▁", "▁self")}
    assert merged == {int(pair.map_b_V[b.convert_tokens_to_ids(piece)]) for piece in ("Ġ", "Ġself")}
    assert len(merged) == 1
    assert int(pair.map_a_V[a.convert_tokens_to_ids("▁dog")]) not in merged, "a mark changes nothing here"
    texts = ["x self. self dog. dog"]
    spans = align(*(encode_batch(each, token_table(each), ["?"], texts, max_length=64) for each in (a, b)))
    assert class_agreement(spans, pair) == 1.0


def test_upper_case_falls_in_its_lower_cases_class():
    a, b = lower_casing_words(["is", "##s", "i"]), spelling_words([("I", "s"), ("Ġ", "Is"), ("Ġ", "i"), ("Ġi", "s")])
    pair = fold_pair(a, token_table(a), b, token_table(b))
    assert pair.map_b_V[b.convert_tokens_to_ids("ĠIs")] == pair.map_a_V[a.convert_tokens_to_ids("is")]


def test_one_fold_serves_where_both_sides_keep_spaces_or_both_drop_them():
    for kind_a, kind_b in (("byte_level", "unigram"), ("word_piece", "word_piece")):
        pair = fold(kind_a, 0, kind_b, 1)
        assert pair.unspaced is None
        assert pair.after_break(aligned(kind_a, kind_b, ["dog"])) is None
        assert pair.parts(None, 3) == [(pair, slice(None))]


def test_a_fold_in_two_parts_covers_every_span_once_and_asks_for_its_break():
    pair = fold("byte_level", 0, "word_piece", 1)
    parts = pair.parts(torch.tensor([True, False, True]), 3)
    assert [part is each for (part, _), each in zip(parts, (pair, pair.unspaced), strict=True)] == [True, True]
    assert [index.tolist() for _, index in parts] == [[1], [0, 2]]
    for missing, received in ((None, "none"), (torch.tensor([True]), r"shape \[1\]")):
        with pytest.raises(ValueError, match=f"after_break_S of 3 spans.*got {received}"):
            pair.parts(missing, 3)


def test_agreement_counts_text_spans_only():
    a = encode_batch(trained("byte_level"), table_of("byte_level"), ["Q:\n"], [""], max_length=64)
    b = encode_batch(trained("unigram"), table_of("unigram"), ["Q:\n"], [""], max_length=64)
    assert class_agreement(align(a, b), fold("byte_level", 0, "unigram", 0)) == 1.0
