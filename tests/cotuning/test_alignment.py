"""Alignment: byte ends, common boundaries, rows of logits, and everything that must not be aligned by guess."""

import unicodedata
from dataclasses import fields, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from cotuning.alignment import Alignment, EncodedBatch, align, encode_batch, token_spans, token_table
from cotuning.encoding import byte_ends
from tests.cotuning.trained_tokenizers import KINDS, SENTENCES, table_of, trained

TRICKY = (
    "\r\n", "\u00a0", "  ", "\n\n", "\t", "e\u0301", "\u0301", "a\u0323\u0301", "각", "\u1100\u1161\u11a8", "\u1161",
    "ㄱㅏ", "ｶﾞ", "ﾞ", "½", "ﬁ", "Ⅷ", "ＡＢ", "\ufdfa", "İ", "ẞ", "ς", "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\U0001f600", "人", "▁", "▁▁a", "Ġ", "##", "<0x41>", "</s>", "<|end|>", "[SEP]", "\x00", "\x7f", "\u200b", "\ufeff",
    "\ufffd", "\u0e33", "\u09c7\u09be",
)  # fmt: skip
pieces = st.one_of(st.sampled_from(TRICKY), st.sampled_from(SENTENCES), st.text(max_size=6))
texts = st.lists(pieces, max_size=6).map("".join)
quick = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


def encode(kind: str, prompts: list[str], responses: list[str], *, seed: int = 0, max_length: int = 4096):
    return encode_batch(trained(kind, seed), table_of(kind, seed), prompts, responses, max_length=max_length)


def spans_of(alignment: Alignment, row: int) -> list[tuple[int, int, int, int]]:
    """(byte start, byte end, row a, row b) of one row's text spans."""
    keep = (alignment.sample_S == row) & ~alignment.is_end_S
    columns = (alignment.byte_start_S, alignment.byte_end_S, alignment.row_a_S, alignment.row_b_S)
    return list(zip(*(column[keep].tolist() for column in columns), strict=True))


def test_a_hand_worked_pair():
    """`ab|c|d` against `a|bc|d` under prompt `p`: common boundaries 0, 3 and 4, so two spans and END."""
    a = hand_made(ends=[2, 3, 4], num_bytes=4, before=1)
    b = hand_made(ends=[1, 3, 4], num_bytes=4, before=2)
    result = align(a, b)
    assert spans_of(result, 0) == [(0, 3, 0, 1), (3, 4, 2, 3)]
    assert result.is_end_S.tolist() == [False, False, True]
    assert (int(result.row_a_S[2]), int(result.row_b_S[2])) == (3, 4)
    assert result.first_token_a_S.tolist() == [1, 3, 4]
    assert result.coverage == 1.0
    assert token_spans(a, result).tolist() == [[-1, 0, 0, 1, -1]]
    assert token_spans(b, result).tolist() == [[-1, -1, 0, 0, 1, -1]]


def hand_made(*, ends: list[int], num_bytes: int, before: int, padding: int = 0, end: bool = True) -> EncodedBatch:
    """One row: `before` prompt tokens, one token for each byte end, END, padding; ids are positions."""
    width = before + len(ends) + int(end) + padding
    content = torch.zeros(1, width, dtype=torch.bool)
    content[0, before : before + len(ends)] = True
    byte_ends = torch.zeros(1, width, dtype=torch.int64)
    byte_ends[0, before : before + len(ends)] = torch.tensor(ends)
    ids = torch.arange(width)[None]
    return EncodedBatch(
        input_ids_BT=ids,
        attention_mask_BT=torch.ones_like(ids),
        labels_BT=ids,
        content_mask_BT=content,
        byte_ends_BT=byte_ends,
        closes_BT=content,
        byte_reaches_BT=byte_ends,
        start_row_B=torch.tensor([before - 1]),
        start_reaches_B=torch.tensor([0]),
        clean_start_B=torch.tensor([True]),
        end_position_B=torch.tensor([before + len(ends) if end else -1]),
        num_bytes_B=torch.tensor([num_bytes]),
        aligned_B=torch.tensor([True]),
        digest_B=torch.tensor([7]),
    )


def slow_alignment(a: EncodedBatch, b: EncodedBatch, row: int) -> list[tuple[int, int, int, int]]:
    """The definition, by dictionaries: for tokenizers that drop no text."""
    sides = []
    for batch in (a, b):
        closing = {0: int(batch.start_row_B[row])} if batch.clean_start_B[row] else {}
        for position in batch.closes_BT[row].nonzero().flatten().tolist():
            closing[int(batch.byte_ends_BT[row, position])] = position
        sides.append(closing)
    common = sorted(sides[0].keys() & sides[1].keys())
    return [
        (start, end, sides[0][start], sides[1][start])
        for start, end in pairwise(common)
        if sides[0][start] >= 0 and sides[1][start] >= 0
    ]


@quick
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=4), st.integers(0, 2), st.integers(0, 2))
def test_batches_align_as_the_definition_says_row_by_row(rows, seed_a, seed_b):
    prompts, responses = [prompt for prompt, _ in rows], [response for _, response in rows]
    for kind_a, kind_b in (("byte_level", "byte_fallback"), ("unigram", "byte_level"), ("byte_fallback", "unigram")):
        a, b = encode(kind_a, prompts, responses, seed=seed_a), encode(kind_b, prompts, responses, seed=seed_b)
        result = align(a, b)
        for row in range(len(rows)):
            assert spans_of(result, row) == slow_alignment(a, b, row)


@quick
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=4), st.integers(0, 2), st.integers(4, 30))
def test_where_no_text_is_dropped_the_way_that_allows_for_it_says_the_same(rows, seed, max_length):
    prompts, responses = [prompt for prompt, _ in rows], [response for _, response in rows]
    a, b = (encode(kind, prompts, responses, seed=seed, max_length=max_length) for kind in ("byte_level", "unigram"))
    # Where no boundary is, text may as well be said to be dropped.
    careful = replace(a, byte_reaches_BT=torch.where(a.closes_BT, a.byte_reaches_BT, a.byte_ends_BT - 1))
    assert careful.drops_text
    expected, result = align(a, b), align(careful, b)
    for field in fields(Alignment):
        assert torch.equal(getattr(result, field.name), getattr(expected, field.name)), field.name


@quick
@given(st.lists(st.tuples(st.lists(st.integers(0, 5), max_size=5), st.integers(0, 30)), max_size=5))
def test_byte_ends_count_back_from_the_end_of_every_row(rows):
    sizes = torch.tensor([size for row, _ in rows for size in row], dtype=torch.int64)
    lengths, num_bytes = torch.tensor([[len(row), size] for row, size in rows], dtype=torch.int64).reshape(-1, 2).T
    expected = [size - sum(row[place + 1 :]) for row, size in rows for place in range(len(row))]
    assert byte_ends(sizes, lengths, num_bytes).tolist() == expected


def normal_form(kind: str, raw: bytes) -> str | bytes:
    """What a tokenizer of this kind makes of a stretch of text."""
    if kind == "byte_level":
        return raw
    if kind == "byte_fallback":
        return raw.replace("▁".encode(), b" ")
    if kind == "unigram":
        return unicodedata.normalize("NFKC", raw.decode()).replace("▁", " ")
    kept = trained("word_piece").backend_tokenizer.normalizer.normalize_str(raw.decode())
    return "".join(kept.split())


def span_text(kind: str, seed: int, ids: list[int]) -> str | bytes | None:
    """The same from a span's tokens, by their pieces; None where one is unknown or special."""
    found = [table_of(kind, seed).pieces[index] for index in ids]
    if any(piece is None for piece in found):
        return None
    raw = b"".join(piece for piece in found if piece is not None)
    if kind.startswith("byte"):
        return raw
    return "".join(raw.decode().split()) if kind == "word_piece" else raw.decode()


def without_dummy(kind: str, text: str, part: str | bytes) -> str | bytes:
    """Metaspace tokenizers put a space before a text, and again after a special token spelled in it: no text."""
    if kind == "byte_level" or (text[:1].isspace() and not any(name in text for name in ("</s>", "<s>", "<unk>"))):
        return part
    return part.lstrip(" " if isinstance(part, str) else b" ")


@quick
@given(texts, texts, st.sampled_from(KINDS), st.sampled_from(KINDS), st.integers(0, 1), st.integers(0, 1))
@example("Q:\n", "e\u0301 ½ ﬁ 각 ㄱㅏ ｶﾞ\r\n", "unigram", "byte_level", 0, 0)
@example("Q:\n", " leading, trailing \n ", "word_piece", "byte_level", 0, 1)
@example("", "no prompt ▁ at all", "byte_fallback", "unigram", 0, 1)
def test_both_sides_of_every_span_hold_the_same_text(prompt, response, kind_a, kind_b, seed_a, seed_b):
    a, b = encode(kind_a, [prompt], [response], seed=seed_a), encode(kind_b, [prompt], [response], seed=seed_b)
    result = align(a, b)
    raw = response.encode()
    previous_end = 0
    for kind, seed, batch, rows_S in ((kind_a, seed_a, a, result.row_a_S), (kind_b, seed_b, b, result.row_b_S)):
        span_BT = token_spans(batch, result)
        for span in range(result.num_spans):
            start, end = int(result.byte_start_S[span]), int(result.byte_end_S[span])
            if result.is_end_S[span]:
                assert start == end == len(raw)
                continue
            tokens = (span_BT[0] == span).nonzero().flatten().tolist()
            assert tokens == list(range(tokens[0], tokens[-1] + 1)), "a span's tokens stand together"
            assert tokens[0] == int(rows_S[span]) + 1, "logits one position before the first token predict it"
            got = span_text(kind, seed, batch.input_ids_BT[0, tokens].tolist())
            if got is not None:
                assert without_dummy(kind, prompt + response, got) == without_dummy(
                    kind, prompt + response, normal_form(kind, raw[start:end])
                )
    for span in range(result.num_spans):
        assert int(result.byte_start_S[span]) >= previous_end, "in order, no byte twice"
        previous_end = int(result.byte_end_S[span])


@quick
@given(texts, st.integers(0, 2), st.integers(0, 2))
def test_spans_cover_every_byte_once_where_nothing_is_dropped(response, seed_a, seed_b):
    """After a prompt that ends in a newline, every response is covered whole, and the turn's end is shared."""
    for kind_a, kind_b in (("byte_level", "byte_fallback"), ("byte_level", "unigram"), ("unigram", "byte_fallback")):
        a, b = encode(kind_a, ["Q:\n"], [response], seed=seed_a), encode(kind_b, ["Q:\n"], [response], seed=seed_b)
        result = align(a, b)
        if not (bool(a.clean_start_B[0]) and bool(b.clean_start_B[0])):
            continue  # a response that begins with white space or a mark may merge with the newline
        covered = [byte for start, end, _, _ in spans_of(result, 0) for byte in range(start, end)]
        assert covered == list(range(len(response.encode())))
        assert result.coverage == 1.0
        assert result.is_end_S.tolist()[-1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_one_tokenizer_against_itself_gives_a_span_for_every_token(kind, seed):
    responses = [text for text in SENTENCES if "e\u0301" not in text and "½" not in text and "ｶ" not in text]
    batch = encode(kind, ["Q:\n"] * len(responses), responses, seed=seed)
    result = align(batch, batch)
    assert torch.equal(result.row_a_S, result.row_b_S)
    spans_per_row = torch.bincount(result.sample_S, minlength=len(responses))
    glued = (batch.content_mask_BT & ~batch.closes_BT).sum(1)
    assert torch.equal(spans_per_row, batch.content_mask_BT.sum(1) - glued + 1)
    assert result.num_skipped == 0


def test_padding_and_the_other_rows_of_a_batch_change_nothing():
    alone = [align(encode("byte_level", ["Q:\n"], [text]), encode("unigram", ["Q:\n"], [text])) for text in SENTENCES]
    prompts = ["Q:\n"] * len(SENTENCES)
    together = align(encode("byte_level", prompts, list(SENTENCES)), encode("unigram", prompts, list(SENTENCES)))
    for row, single in enumerate(alone):
        assert spans_of(together, row) == spans_of(single, 0)
    padded = align(
        hand_made(ends=[2, 3], num_bytes=3, before=1, padding=37), hand_made(ends=[3], num_bytes=3, before=4)
    )
    assert spans_of(padded, 0) == [(0, 3, 0, 3)]


@pytest.mark.parametrize("sides", ["a", "b", "ab"])
def test_left_padding_moves_rows_with_their_tokens_and_changes_no_span(sides):
    prompts, responses = ["Q:\n", "A longer question:\n", ""], ["The dog sleeps on.", "Yes", "One two"]
    a, b = encode("byte_level", prompts, responses, seed=3), encode("unigram", prompts, responses, seed=1)
    right = align(a, b)
    moved_a, moved_b = a.left_padded() if "a" in sides else a, b.left_padded() if "b" in sides else b
    left = align(moved_a, moved_b)
    assert bool((moved_a.attention_mask_BT[:, -1] == 1).all()) == ("a" in sides)
    for name in ("sample_S", "byte_start_S", "byte_end_S", "is_end_S", "first_token_a_S", "first_token_b_S"):
        assert torch.equal(getattr(left, name), getattr(right, name)), name
    shift = a.input_ids_BT.shape[1] - a.attention_mask_BT.sum(1)
    expected = right.row_a_S + shift[right.sample_S] if "a" in sides else right.row_a_S
    assert torch.equal(left.row_a_S, expected)
    assert left.coverage == right.coverage
    labels = moved_a.labels_BT[:, 1:]
    assert torch.equal(labels[left.sample_S, left.row_a_S], left.first_token_a_S)


def test_chat_templates_of_different_length_change_rows_not_spans():
    """Each side renders the prompt its own way; the bytes of the response are what is shared, and both END."""
    response = "The lazy dog\r\nsleeps \U0001f468\u200d\U0001f469 on."
    plain = align(encode("byte_level", ["Q:\n"], [response]), encode("byte_fallback", ["Q:\n"], [response], seed=1))
    templated = align(
        encode("byte_level", ["<|start|>user\nQ: why?<|end|>\nassistant\n"], [response]),
        encode("byte_fallback", ["[INST] Q: why? [/INST]\n"], [response], seed=1),
    )
    assert [span[:2] for span in spans_of(plain, 0)] == [span[:2] for span in spans_of(templated, 0)]
    assert templated.is_end_S.tolist()[-1]
    assert templated.coverage == 1.0
    assert not torch.equal(plain.row_a_S, templated.row_a_S)


@pytest.mark.parametrize("strips", [False, True])
def test_tokens_added_as_plain_text_are_text(strips):
    """With `lstrip` and `rstrip` an added token swallows white space around it, so that its piece is not its text."""
    raw = Tokenizer.from_str(trained("byte_level", 3).backend_tokenizer.to_str())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>", bos_token="<|start|>")
    tokenizer.add_tokens([AddedToken("<think>", special=False, lstrip=strips, rstrip=strips)])
    texts = ["so <think> the dog", "<think>", "dog<think>dog"]
    a = encode_batch(tokenizer, token_table(tokenizer), ["Q:\n"] * 3, texts, max_length=64)
    assert int((a.input_ids_BT == tokenizer.convert_tokens_to_ids("<think>")).sum()) == 3
    result = align(a, encode("byte_fallback", ["Q:\n"] * 3, texts))
    assert result.num_skipped == 0
    assert result.coverage == (1.0 if not strips else pytest.approx(1.0, abs=0.1))
    for row, text in enumerate(texts):
        for start, end, row_a, _ in spans_of(result, row):
            if int(a.input_ids_BT[row, row_a + 1]) == tokenizer.convert_tokens_to_ids("<think>"):
                assert "<think>" in text.encode()[start:end].decode()


def test_a_prefix_on_one_side_only_moves_rows_not_spans():
    with_bos = next(seed for seed in range(20) if table_of("byte_level", seed).prefix_ids)
    without = next(seed for seed in range(20) if not table_of("byte_fallback", seed).prefix_ids)
    a = encode("byte_level", ["Q:\n"], ["The dog sleeps."], seed=with_bos)
    b = encode("byte_fallback", ["Q:\n"], ["The dog sleeps."], seed=without)
    assert a.input_ids_BT[0, 0] == table_of("byte_level", with_bos).prefix_ids[0]
    spelled = encode("byte_level", ["<|start|>Q:\n"], ["The dog sleeps."], seed=with_bos)
    assert torch.equal(spelled.input_ids_BT, a.input_ids_BT), "a template that spells BOS gets no second one"
    assert align(a, b).coverage == 1.0
    assert [span[:2] for span in spans_of(align(a, b), 0)] == [span[:2] for span in spans_of(align(spelled, b), 0)]


def test_a_seam_token_is_never_matched_by_position():
    """A prompt whose end merges with the response's start: the first span starts at the next common boundary."""
    tokenizer = trained("byte_level")
    word = next(
        text for text in (" means", " the", " the dog", " status") if len(tokenizer(text)["input_ids"]) < len(text)
    )
    split = len(word) - 1
    a = encode("byte_level", ["x" + word[:split]], [word[split:] + " dog"])
    b = encode("word_piece", ["x" + word[:split]], [word[split:] + " dog"])
    if bool(a.clean_start_B[0]):
        pytest.skip("this vocabulary has no token over the seam")
    assert int(a.labels_BT[0, int(a.start_row_B[0]) + 1]) != -100
    assert all(start > 0 for start, *_ in spans_of(align(a, b), 0))


def test_labels_and_logits_are_shifted_alike():
    """`labels[t]` is the id at t, to be predicted at t - 1; a span's row is its first token's position minus one."""
    batch = encode("byte_level", ["Q:\n"], ["The lazy dog"])
    result = align(batch, batch)
    labels = batch.labels_BT[0]
    shifted = labels[1:]
    assert torch.equal(shifted[result.row_a_S], result.first_token_a_S)
    assert (shifted != -100).nonzero().flatten().tolist() == result.row_a_S.tolist()


def test_truncation_that_differs_by_side_drops_the_tail_and_end():
    response = "The quick brown fox jumps over the lazy dog; the dog sleeps on."
    whole = encode("byte_level", ["Question\n"], [response])
    cut = encode("byte_fallback", ["Question\n"], [response], max_length=12)
    assert cut.input_ids_BT.shape[1] == 12
    assert int(cut.end_position_B[0]) == -1
    result = align(whole, cut)
    seen = int(cut.byte_ends_BT.max())
    assert result.num_spans > 0
    assert not bool(result.is_end_S.any())
    assert int(result.byte_end_S.max()) <= seen < len(response)
    assert int(result.total_bytes) == seen, "what a side was never shown is not held against the alignment"
    full = {span[:2] for span in spans_of(align(whole, encode("byte_fallback", ["Question\n"], [response])), 0)}
    assert {span[:2] for span in spans_of(result, 0)} <= full


def test_an_over_long_row_loses_its_prompt_head_first():
    tokenizer = trained("byte_level", next(s for s in range(20) if table_of("byte_level", s).prefix_ids))
    table = token_table(tokenizer)
    long_prompt = "unbelievable " * 30 + "\n"
    batch = encode_batch(tokenizer, table, [long_prompt], ["dog"], max_length=16)
    ids = batch.input_ids_BT[0].tolist()
    assert len(ids) == 16
    assert ids[0] == table.prefix_ids[0]
    assert ids[-1] == table.end_id
    assert tokenizer.decode(ids[1:-1]).endswith("\ndog")
    tight = encode_batch(tokenizer, table, [long_prompt], ["dog " * 30], max_length=8)
    assert (tight.labels_BT[0] != -100).tolist() == [False] + [True] * 7
    no_prefix = encode("word_piece", ["prompt\n"], ["dog " * 30], seed=0, max_length=8)
    assert (no_prefix.labels_BT[0] != -100).sum() == 7, "one token stays before the response"


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_response_still_ends_the_turn(kind):
    a, b = encode(kind, ["Q:\n", "Q:\n"], ["", "dog"]), encode("byte_level", ["Q:\n", "Q:\n"], ["", "dog"], seed=1)
    result = align(a, b)
    first = (result.sample_S == 0).nonzero().flatten().tolist()
    assert [bool(result.is_end_S[index]) for index in first] == [True]
    assert int(result.row_a_S[first[0]]) == int(a.end_position_B[0]) - 1
    assert result.first_token_a_S[first[0]] == table_of(kind).end_id


def test_nothing_before_the_response_means_no_row_to_predict_it_from():
    without = next(seed for seed in range(20) if not table_of("byte_level", seed).prefix_ids)
    batch = encode("byte_level", [""], ["dog"], seed=without)
    result = align(batch, batch)
    assert int(batch.start_row_B[0]) == -1
    assert all(row >= 0 for row in result.row_a_S.tolist())
    assert spans_of(result, 0) == [span for span in spans_of(result, 0) if span[0] > 0]


def test_text_that_one_side_drops_gives_no_row_but_is_covered():
    a, b = encode("word_piece", ["Q:\n"], ["the\n\n  dog "]), encode("byte_level", ["Q:\n"], ["the\n\n  dog "])
    result = align(a, b)
    starts = [start for start, *_ in spans_of(result, 0)]
    assert 0 in starts
    assert result.coverage == 1.0
    rows = [row for _, _, row, _ in spans_of(result, 0)]
    assert len(rows) == len(set(rows)), "no position of the dropping side is used for two spans"
    assert result.is_end_S.tolist()[-1]


def test_special_tokens_spelled_in_a_response_are_text_not_events():
    a = encode("byte_level", ["Q:\n"], ["stop </s> and <|end|> here"])
    b = encode("byte_fallback", ["Q:\n"], ["stop </s> and <|end|> here"])
    result = align(a, b)
    assert result.num_skipped == 0
    assert result.coverage == 1.0
    assert result.is_end_S.sum() == 1


def test_a_slow_tokenizer_is_skipped_and_counted_where_its_bytes_are_unknown():
    slow = ByT5Tokenizer()
    table = token_table(slow)
    a = encode_batch(slow, table, ["Q:\n"] * 2, ["plain", "naïve"], max_length=64)
    b = encode("byte_level", ["Q:\n"] * 2, ["plain", "naïve"])
    result = align(a, b)
    assert a.aligned_B.tolist() == [True, False]
    assert result.num_skipped == 1
    assert set(result.sample_S.tolist()) == {0}
    assert 0 < result.coverage < 1
    assert int((a.labels_BT[1] != -100).sum()) == len("naïve".encode()) + 1, "cross-entropy keeps the whole response"


def test_different_responses_and_bad_input_are_refused():
    a, b = encode("byte_level", ["Q:\n"], ["dog"]), encode("unigram", ["Q:\n"], ["cat"])
    with pytest.raises(ValueError, match=r"same responses.*rows \[0\]"):
        align(a, b)
    with pytest.raises(ValueError, match="got 1 and 2"):
        align(a, encode("unigram", ["Q:\n"] * 2, ["dog", "dog"]))
    with pytest.raises(ValueError, match="lone surrogate"):
        encode("byte_level", ["Q:\n"], ["bad \ud800"])
    with pytest.raises(ValueError, match="1 prompts, 2 responses"):
        encode("byte_level", ["Q:\n"], ["a", "b"])
    with pytest.raises(ValueError, match="max_length"):
        encode("byte_level", ["Q:\n"], ["a"], max_length=3)


def test_an_empty_batch_is_an_empty_alignment():
    a, b = encode("byte_level", [], []), encode("unigram", [], [])
    result = align(a, b)
    assert (result.num_spans, result.num_skipped, result.coverage) == (0, 0, 1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_token_tables_are_deterministic_and_spell_the_vocabulary(kind):
    tokenizer = trained(kind)
    table = token_table(tokenizer)
    assert table.fingerprint == token_table(tokenizer).fingerprint
    assert table.fingerprint != table_of("byte_level", 5).fingerprint
    assert table.pieces[table.end_id] is None
    assert int(table.byte_lengths_V[table.end_id]) == 0
    for index in (0, 30, table.num_tokens - 1):
        assert table.spelled[index] == (table.pieces[index] or b"")
        assert int(table.byte_lengths_V[index]) == len(table.spelled[index])
    dog = [piece for piece in table.pieces if piece in (b" dog", b" do", b" d", b"d")]
    assert dog, "white space is written as a space in every kind"


def test_the_end_of_turn_follows_the_chat_template():
    raw = trained("byte_level", 3).backend_tokenizer.to_str()
    chat = type(trained("byte_level", 3))(tokenizer_object=type(trained("byte_level").backend_tokenizer).from_str(raw))
    chat.add_special_tokens({"eos_token": "<|end|>", "additional_special_tokens": ["<|turn|>"]})
    chat.chat_template = "{% for m in messages %}{{ m['role'] }}\n{{ m['content'] }}<|turn|>\n{% endfor %}"
    assert token_table(chat).end_id == chat.convert_tokens_to_ids("<|turn|>")
    nameless = type(chat)(tokenizer_object=type(chat.backend_tokenizer).from_str(raw))
    with pytest.raises(ValueError, match="EOS or separator"):
        token_table(nameless)
