"""Examples that a model writes from public ones, and how many of them others kept.

A seed is a public row. The model is shown the seed and a few more public rows of the same task, each as three labelled
lines, and asked for one more; what it answers is a candidate if it has the same form (few-shot generation as in
Self-Instruct, arXiv 2212.10560; the form and the rest are ours). Seeds are drawn by how often candidates of their group
were kept, and a group is a seed or all seeds of a task.

Names: S seeds, G groups, N candidates.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cotuning.examples import Example
from cotuning.generation import sample
from cotuning.language_model import LanguageModel
from cotuning.seeding import derive_seed

_REQUEST = "Write one more example in the form of these."
_FORM = re.compile(
    r"\s*Instruction:(?P<instruction>.*?)(?:\n\s*Input:(?P<input>.*?))?\n\s*Output:(?P<output>.*?)(?:\n\s*Instruction:|\Z)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Candidate:
    """A row that a model wrote.

    Attributes:
        example: what it wrote; the task is the seed's.
        group: of the seed from which it was written.
    """

    example: Example
    group: int


@dataclass(frozen=True)
class Tallies:
    """What became of all candidates so far.

    Attributes:
        offered_G: int64, candidates of each group times devices that answered for them.
        kept_G: int64, how many of them were kept.
    """

    offered_G: Tensor
    kept_G: Tensor

    @classmethod
    def empty(cls, num_groups: int) -> "Tallies":
        """Before the first candidate."""
        return cls(torch.zeros(num_groups, dtype=torch.int64), torch.zeros(num_groups, dtype=torch.int64))

    def add(self, written_G: Tensor, counts: Sequence[Tensor]) -> "Tallies":
        """Count a round.

        Args:
            written_G: candidates of each group that every device was given, from `count_groups`.
            counts: how many each device kept, from `check_counts`.
        """
        kept_G = torch.stack([*counts, torch.zeros_like(self.kept_G)]).sum(0)
        return Tallies(self.offered_G + len(counts) * written_G, self.kept_G + kept_G)


def group_seeds(seeds: Sequence[Example], count_by: str) -> list[int]:
    """The group of each seed: its own, or that of its task, tasks in alphabetical order.

    Raises:
        ValueError: neither `seed` nor `task`.
    """
    if count_by == "seed":
        return list(range(len(seeds)))
    if count_by != "task":
        raise ValueError(f"expected to count by seed or task, got {count_by!r}")
    group_of_task = {task: group for group, task in enumerate(sorted({seed.task for seed in seeds}))}
    return [group_of_task[seed.task] for seed in seeds]


def count_groups(candidates: Sequence[Candidate], num_groups: int) -> Tensor:
    """Candidates of each group: int64 [G].

    Raises:
        ValueError: a group out of range.
    """
    groups_N = torch.tensor([candidate.group for candidate in candidates], dtype=torch.int64)
    wrong = groups_N[(groups_N < 0) | (groups_N >= num_groups)].tolist()
    if wrong:
        raise ValueError(f"expected groups in 0..{num_groups - 1}, got {wrong[0]}")
    return torch.bincount(groups_N, minlength=num_groups)


def check_counts(kept_G: Tensor, written_G: Tensor) -> Tensor:
    """What a device says it kept.

    Args:
        kept_G: what came.
        written_G: candidates of each group that it was given.

    Raises:
        ValueError: another shape or type, or counts that no device can have.
    """
    if kept_G.dtype != torch.int64 or kept_G.shape != written_G.shape:
        raise ValueError(f"expected counts as int64 {list(written_G.shape)}, got {kept_G.dtype} {list(kept_G.shape)}")
    for group in ((kept_G < 0) | (kept_G > written_G)).nonzero().flatten().tolist()[:1]:
        raise ValueError(f"expected a count in 0..{int(written_G[group])} for group {group}, got {int(kept_G[group])}")
    return kept_G


def seed_weights(tallies: Tallies, groups: Sequence[int], smoothing: float) -> Tensor:
    """The probability of each seed: float64 [S], in proportion to `(kept + a) / (offered + 2 a)` of its group.

    That share is the mean of a Beta(a, a) prior after the counts, so that no seed is ever lost and an untried one
    counts as kept every other time.

    Args:
        tallies: so far.
        groups: of each seed.
        smoothing: a, above 0.

    Raises:
        ValueError: no seeds, or no smoothing.
    """
    if not groups or smoothing <= 0:
        raise ValueError(f"expected seeds and a smoothing above 0, got {len(groups)} seeds and {smoothing}")
    share_G = (tallies.kept_G.double() + smoothing) / (tallies.offered_G.double() + 2 * smoothing)
    share_S = share_G[torch.tensor(groups)]
    return share_S / share_S.sum()


def write_candidates(
    lm: LanguageModel,
    seeds: Sequence[Example],
    groups: Sequence[int],
    weights_S: Tensor,
    *,
    count: int,
    shots: int,
    max_new_tokens: int,
    temperature: float,
    max_length: int,
    seed: int,
) -> list[Candidate]:
    """Let a model write up to `count` examples; what has not the form, or is there already, is left out.

    Args:
        lm: as it stands with its adapters.
        seeds: S public rows.
        groups: of each.
        weights_S: how likely each is drawn, from `seed_weights`; with replacement.
        count: N at most.
        shots: public rows in a prompt, the seed last.
        max_new_tokens: of an answer.
        temperature: of the sampling.
        max_length: tokens of a prompt; what is longer loses its head.
        seed: the only randomness.

    Returns:
        In the order in which their seeds were drawn.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "seeds"))
    drawn = torch.multinomial(weights_S, count, replacement=True, generator=generator).tolist()
    prompts = [prompt_of(seeds, place, shots, generator) for place in drawn]
    answers = sample(
        lm,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=derive_seed(seed, "candidates"),
        max_length=max_length,
    )
    known = {_content(row) for row in seeds}
    candidates: list[Candidate] = []
    for number, (place, answer) in enumerate(zip(drawn, answers, strict=True)):
        parts = read_example(answer)
        if parts is None or parts in known:
            continue
        known.add(parts)
        example = Example(f"candidate-{number}", *parts, task=seeds[place].task)
        candidates.append(Candidate(example, groups[place]))
    return candidates


def prompt_of(seeds: Sequence[Example], place: int, shots: int, generator: torch.Generator) -> Example:
    """The prompt that asks for one more example like the seed at `place`; others of its task stand before it."""
    alike = [other for other, row in enumerate(seeds) if other != place and row.task == seeds[place].task]
    order = torch.randperm(len(alike), generator=generator)[: shots - 1].tolist()
    shown = [*(seeds[alike[index]] for index in order), seeds[place]]
    return Example("", _REQUEST, "\n\n".join(_written(row) for row in shown), "")


def read_example(text: str) -> tuple[str, str, str] | None:
    """Instruction, input and output of the first example in what a model wrote; None where it has not the form."""
    found = _FORM.match(text)
    if found is None:
        return None
    instruction, given, output = ((found[name] or "").strip() for name in ("instruction", "input", "output"))
    return (instruction, given, output) if instruction and output else None


def _content(row: Example) -> tuple[str, str, str]:
    return row.instruction.strip(), row.input.strip(), row.output.strip()


def _written(row: Example) -> str:
    lines = [f"Instruction: {row.instruction}", f"Input: {row.input}", f"Output: {row.output}"]
    return "\n".join(lines if row.input else [lines[0], lines[2]])
