from dataclasses import replace

import pytest
import torch

from cotuning import candidates
from cotuning.candidates import (
    Candidate,
    Tallies,
    check_counts,
    count_groups,
    group_seeds,
    prompt_of,
    read_example,
    seed_weights,
    write_candidates,
)
from cotuning.examples import Example
from cotuning.language_model import LanguageModel
from tests.tiny_models import tiny_examples, tiny_language_model

SEEDS = [replace(row, task=task) for row, task in zip(tiny_examples(6), "aabbbc", strict=True)]


def counts(*values: int) -> torch.Tensor:
    return torch.tensor(values)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Instruction: Add.\nInput: 1 2\nOutput: 3", ("Add.", "1 2", "3")),
        ("\n Instruction: Add 1 and 2.\nOutput: 3\n", ("Add 1 and 2.", "", "3")),
        ("Instruction: A\nInput: b\nOutput: c\nd\n\nInstruction: E\nOutput: f", ("A", "b", "c\nd")),
        ("Instruction: A\nb\nInput:\nOutput: c", ("A\nb", "", "c")),
        ("Instruction: A\nOutput:", None),
        ("Instruction:\nOutput: c", None),
        ("Output: c\nInstruction: A", None),
        ("something else", None),
        ("", None),
    ],
    ids=["three", "two", "first_of_two", "empty_input", "no_answer", "no_question", "order", "prose", "nothing"],
)
def test_what_is_read_from_an_answer(text: str, expected: tuple[str, str, str] | None) -> None:
    assert read_example(text) == expected


def test_a_prompt_shows_the_seed_last_and_others_of_its_task() -> None:
    generator = torch.Generator().manual_seed(0)
    prompt = prompt_of(SEEDS, 3, 2, generator)
    blocks = prompt.input.split("\n\n")
    row = SEEDS[3]
    assert blocks[-1] == f"Instruction: {row.instruction}\nInput: {row.input}\nOutput: {row.output}"
    assert len(blocks) == 2
    assert blocks[0].split("Output: ")[1] in {SEEDS[2].output, SEEDS[4].output}
    assert prompt_of(SEEDS, 5, 4, generator).input.count("Instruction:") == 1  # nothing else of its task
    assert prompt_of(SEEDS, 0, 1, generator).input.count("Instruction:") == 1
    without = prompt_of([replace(row, input="")], 0, 1, generator)
    assert "Input:" not in without.input
    assert read_example(blocks[-1]) == (row.instruction, row.input, row.output)


def test_groups_are_seeds_or_tasks() -> None:
    assert group_seeds(SEEDS, "seed") == [0, 1, 2, 3, 4, 5]
    assert group_seeds(SEEDS[::-1], "task") == [2, 1, 1, 1, 0, 0]
    with pytest.raises(ValueError, match="count by seed or task, got 'row'"):
        group_seeds(SEEDS, "row")


def test_candidates_are_counted_by_group() -> None:
    rows = [Candidate(SEEDS[0], group) for group in (2, 0, 2)]
    assert count_groups(rows, 4).tolist() == [1, 0, 2, 0]
    assert count_groups([], 2).tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"groups in 0\.\.1, got 2"):
        count_groups(rows, 2)


def test_weights_by_hand() -> None:
    tallies = Tallies(counts(8, 0, 4), counts(2, 0, 4))
    # (2 + 1) / (8 + 2), (0 + 1) / (0 + 2), (4 + 1) / (4 + 2), the last group twice
    shares = [0.3, 0.5, 5 / 6, 5 / 6]
    expected = [share / sum(shares) for share in shares]
    assert seed_weights(tallies, [0, 1, 2, 2], 1.0).tolist() == pytest.approx(expected)
    assert seed_weights(Tallies.empty(3), [0, 1, 2], 0.5).tolist() == pytest.approx([1 / 3] * 3)
    with pytest.raises(ValueError, match=r"got 0 seeds and 1\.0"):
        seed_weights(tallies, [], 1.0)
    with pytest.raises(ValueError, match="above 0, got 1 seeds and 0"):
        seed_weights(tallies, [0], 0)


def test_tallies_add_up_and_forget_nobodys_order() -> None:
    start = Tallies(counts(1, 2), counts(0, 2))
    one = start.add(counts(3, 1), [counts(2, 0), counts(0, 1), counts(3, 1)])
    assert (one.offered_G.tolist(), one.kept_G.tolist()) == ([10, 5], [5, 4])
    other = start.add(counts(3, 1), [counts(3, 1), counts(0, 1), counts(2, 0)])
    assert torch.equal(one.kept_G, other.kept_G)
    nobody = start.add(counts(3, 1), [])
    assert (nobody.offered_G.tolist(), nobody.kept_G.tolist()) == ([1, 2], [0, 2])


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (torch.tensor([1, 4]), r"a count in 0\.\.3 for group 1, got 4"),
        (torch.tensor([-1, 0]), r"a count in 0\.\.2 for group 0, got -1"),
        (torch.tensor([1, 0, 0]), r"int64 \[2\], got torch.int64 \[3\]"),
        (torch.tensor([1.0, 0.0]), r"int64 \[2\], got torch.float32 \[2\]"),
    ],
    ids=["too_many", "negative", "shape", "type"],
)
def test_counts_that_no_device_can_have_are_refused(kept: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_counts(kept, counts(2, 3))


def write(lm: LanguageModel, weights: list[float], **changes: int) -> list[Candidate]:
    options = {"count": 8, "shots": 2, "max_new_tokens": 24, "max_length": 128, "seed": 4} | changes
    weights_S = torch.tensor(weights, dtype=torch.float64)
    return write_candidates(lm, SEEDS, list(range(6)), weights_S, temperature=0.5, **options)


def answering(monkeypatch: pytest.MonkeyPatch, answers: list[str]) -> list[list[Example]]:
    """Let `sample` give `answers` one after the other; returns where the prompts are put."""
    asked: list[list[Example]] = []

    def answer(lm: LanguageModel, prompts: list[Example], **options: object) -> list[str]:
        asked.append(prompts)
        return [answers[number % len(answers)] for number in range(len(prompts))]

    monkeypatch.setattr(candidates, "sample", answer)
    return asked


def test_what_is_written_has_its_seeds_task_and_group_and_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    known = SEEDS[1]
    answers = [
        "Instruction: New.\nOutput: 1",
        "no form",
        f"Instruction: {known.instruction}\nInput: {known.input}\nOutput: {known.output}",
        "Instruction: New.\nOutput: 2",
    ]
    asked = answering(monkeypatch, answers)
    written = write(tiny_language_model("llama"), [0.0, 0.0, 0.0, 0.0, 0.0, 1.0])
    assert [(each.example.output, each.example.task, each.group) for each in written] == [("1", "c", 5), ("2", "c", 5)]
    assert len({each.example.id for each in written}) == 2
    assert len(asked[0]) == 8


def test_seeds_are_drawn_by_their_weights_and_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answering(monkeypatch, ["nothing"])
    lm = tiny_language_model("llama")
    weights = [0.0, 0.25, 0.0, 0.0, 0.75, 0.0]
    for seed in (4, 4, 5):
        write(lm, weights, count=400, shots=1, seed=seed)
    assert asked[0] == asked[1] != asked[2]
    shares = [sum(SEEDS[place].output in prompt.input for prompt in asked[0]) / 400 for place in (1, 4)]
    assert sum(shares) == 1
    assert shares[1] == pytest.approx(0.75, abs=0.1)


def test_a_model_writes_and_the_same_seed_gives_the_same() -> None:
    lm = tiny_language_model("llama")
    assert write(lm, [1 / 6] * 6) == write(lm, [1 / 6] * 6)
