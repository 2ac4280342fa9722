"""What counts as holding a protected row, and what does not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotuning.contamination import SHARED_WORDS, ProtectedRows, text_of, words
from cotuning.examples import Example

LONG = Example(
    "science/test:1",
    "Answer the question about nature.",
    "Why do leaves that were green all summer turn red and yellow when the days grow short?",
    "Because the green pigment breaks down and others show.",
)
SHORT = Example("geo/train:7", "Name the capital of the country.", "France", "Paris")
MIDDLE = Example("code/validation:3", "Translate.", "list all files with their sizes", "ls -l -a")
PROTECTED = ProtectedRows([LONG, SHORT, MIDDLE])


def kind_of(text: str) -> str | None:
    finding = PROTECTED.find(text)
    return finding.kind if finding else None


@pytest.mark.parametrize(
    "text",
    [
        f"Instruction: {LONG.instruction}\nInput: {LONG.input}\nOutput: {LONG.output}",
        f"Question: {LONG.input}\nAnswer: {LONG.output}",
        f"{LONG.input.upper()}\n{LONG.output}",
        f"  {LONG.input}   {LONG.output}!!",
    ],
)
def test_a_row_is_found_in_every_rendering(text: str) -> None:
    finding = PROTECTED.find(text, 5)
    assert finding is not None
    assert (finding.place, finding.row, finding.kind) == (5, LONG.id, "exact")
    assert kind_of(f"He asked me something.\n{text}\nI did not know.") == "shared_words"


def test_thirteen_words_in_a_row_are_too_many_and_twelve_are_not() -> None:
    own = words(f"{LONG.input} {LONG.output}")
    for start in range(len(own) - SHARED_WORDS + 1):
        assert kind_of("x " + " ".join(own[start : start + SHARED_WORDS]) + " y") == "shared_words"
        assert kind_of("x " + " ".join(own[start : start + SHARED_WORDS - 1]) + " y") is None


def test_a_row_of_a_few_words_is_found_whole_with_its_instruction_only() -> None:
    assert kind_of("They went from France to Paris. France, Paris!") is None
    assert kind_of("Name the capital of the country: France. Paris. And so on.") == "whole"
    assert kind_of("Input: France\nOutput: Paris") == "exact"


def test_a_row_shorter_than_thirteen_words_is_found_whole_without_its_instruction() -> None:
    assert kind_of("Now do: list all files with their sizes\nls -l -a\nThat was it.") == "whole"
    assert kind_of("Now do: list all files with their sizes\nls -l -b\nThat was it.") is None


def test_an_instruction_that_many_rows_share_is_no_finding() -> None:
    asked = "Answer the question with one of the options that are given after it, and with nothing else at all."
    protected = ProtectedRows([Example("a", asked, "Is water wet?", "yes")])
    assert protected.find(text_of(Example("b", asked, "Is fire cold?", "no"))) is None


def test_findings_come_in_order_one_a_text_and_progress_is_told() -> None:
    told: list[tuple[int, int]] = []
    texts = ["nothing", text_of(LONG), "", text_of(SHORT)]
    found = list(PROTECTED.find_all(texts, lambda *each: told.append(each)))
    assert [(each.place, each.row) for each in found] == [(1, LONG.id), (3, SHORT.id)]
    assert told[-1] == (4, 4)


def test_too_short_a_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2, got 1"):
        ProtectedRows([], shared_words=1)


WORD = st.sampled_from(["a", "b", "c"])


@given(st.lists(st.tuples(WORD, st.lists(WORD, min_size=1, max_size=9)), max_size=4), st.lists(WORD, max_size=14))
def test_finds_what_a_slow_search_finds(rows: list[tuple[str, list[str]]], text: list[str]) -> None:
    """Every place of the text against every sequence of every row, written out."""
    examples = [Example(str(index), "i", first, " ".join(rest)) for index, (first, rest) in enumerate(rows)]
    forbidden = []
    for row in examples:
        own = [row.input, *row.output.split()]
        forbidden += [own[start : start + 8] for start in range(len(own) - 7)]
        if 6 <= len(own) < 8:
            forbidden.append(own)
        elif len(own) < 6:
            forbidden.append(["i", *own])
    places = range(len(text) + 1)
    held = any(text[start : start + len(each)] == each for each in forbidden for start in places)
    equal = any(text in ([row.input, *row.output.split()], ["i", row.input, *row.output.split()]) for row in examples)
    assert (ProtectedRows(examples, shared_words=8).find(" ".join(text)) is not None) == (held or equal)
