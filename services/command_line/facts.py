"""The domain sets that the project makes for itself: three domains of narrow questions that need no download.

Written in the format of any other data folder (`<domain>/{train,validation,test}.jsonl`, `public.jsonl`,
`corpus.txt.gz`), so that the demo reads them as it reads a user's own. The same bytes on every machine and Python:
nothing is drawn from a random generator, the order is that of SHA-256 digests.

Who knows what:

- A *recall* task asks for facts that cannot be inferred (a port, a reason phrase). Its facts are dealt out: one half
  is in the public set and the corpus, the other only in the device's private rows. Validation and test ask both.
- A *rule* task can be inferred (a weekday 12 days later). Its questions are dealt out to public, train, validation and
  test, so that no tested question was in another split.

Train, validation, test and public each ask in wordings of their own; so no row is in two splits. The corpus tells the
public facts in sentences and holds no row, and no recall fact, of a device.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

from assets.corpora import write_documents
from command_line.fact_questions import DOMAINS, Question, Split, Task
from command_line.fact_tables import MONTHS, WEEKDAYS

ROWS: dict[Split, int] = {"train": 240, "validation": 60, "test": 150}
"""Rows of each domain by split; the public set has every question dealt to it."""

RECALL_PUBLIC_SHARE = 0.5
RECALL_REPEATS: dict[Split, int] = {"public": 3, "train": 2}
RULE_SHARES: dict[Split, float] = {"public": 0.5, "train": 0.25, "validation": 0.05, "test": 0.2}


@dataclass(frozen=True)
class Row:
    """One line of a data file: a question in one wording, and its answer."""

    domain: str
    task: str
    instruction: str
    input: str
    output: str

    @property
    def id(self) -> str:
        """Domain and the first digits of the question's SHA-256: equal for equal questions and for no others."""
        return f"{self.domain}-{_digest(self.task, self.instruction, self.input)[:12]}"

    def to_json(self) -> str:
        """The row as one line of JSON."""
        names = ("id", "domain", "task", "instruction", "input", "output")
        return json.dumps({name: getattr(self, name) for name in names}, ensure_ascii=False)


def write_domains(folder: Path) -> list[str]:
    """Write every domain, the public set and the corpus under `folder`; return the domains' names in order.

    Files that are there already are replaced. Raises OSError if the folder cannot be written.
    """
    for domain in DOMAINS:
        for split in ROWS:
            _write_lines(folder / domain / f"{split}.jsonl", (row.to_json() for row in domain_rows(domain, split)))
    _write_lines(folder / "public.jsonl", (row.to_json() for row in public_rows()))
    write_documents(folder / "corpus.txt.gz", list(corpus_documents()))
    return list(DOMAINS)


def domain_rows(domain: str, split: Split) -> list[Row]:
    """The rows of one split of one domain: every task alike, as many as `ROWS` says."""
    by_task = [_worded(domain, task, split, deal(task)[split]) for task in DOMAINS[domain]]
    in_turn = (row for rows in zip_longest(*by_task) for row in rows if row is not None)
    return [row for row, _ in zip(in_turn, range(ROWS[split]), strict=False)]


def public_rows() -> list[Row]:
    """The server's rows, of every domain and task, mixed."""
    rows = chain.from_iterable(
        _worded("public", task, "public", deal(task)["public"]) for tasks in DOMAINS.values() for task in tasks
    )
    return sorted(rows, key=lambda row: _digest("public order", row.id))


def corpus_documents() -> Iterator[str]:
    """Texts for pretraining: sequences, and the public facts told in sentences, eight a document."""
    for names in (WEEKDAYS, MONTHS, [str(number) for number in range(1, 101)]):
        for start in range(0, len(names), 12):
            yield ", ".join([*names[start:], *names[:start]][:24]) + "."
    sentences = [
        task.statement.format(input=question.input, output=question.output)
        for tasks in DOMAINS.values()
        for task in tasks
        for question in deal(task)["public"]
    ]
    sentences.sort(key=lambda sentence: _digest("corpus order", sentence))
    for start in range(0, len(sentences), 8):
        yield " ".join(sentences[start : start + 8])


def deal(task: Task) -> dict[Split, list[Question]]:
    """Deal a task's questions out to the splits (see the module's first lines), in an order only digests decide."""
    ordered = sorted(task.questions, key=lambda question: _digest(task.name, question.input))
    if task.recall:
        cut = round(RECALL_PUBLIC_SHARE * len(ordered))
        public, private = ordered[:cut], ordered[cut:]
        both = [each for pair in zip_longest(private, public) for each in pair if each is not None]
        return {"public": public, "train": private, "validation": both[::-1], "test": both}
    dealt: dict[Split, list[Question]] = {}
    share = 0.0
    for split, part in RULE_SHARES.items():
        dealt[split] = ordered[round(share * len(ordered)) : round((share + part) * len(ordered))]
        share += part
    return dealt


def _worded(domain: str, task: Task, split: Split, questions: Sequence[Question]) -> list[Row]:
    """Facts that must be known are told in several wordings where they are learned; all else is asked once."""
    wordings = task.wordings(split)
    repeats = RECALL_REPEATS.get(split, 1) if task.recall else 1
    return [
        # 5 shares no factor with any number of wordings: neighbours differ in frame and in thing.
        Row(domain, task.name, wordings[5 * (index + repeat) % len(wordings)], question.input, question.output)
        for repeat in range(repeats)
        for index, question in enumerate(questions)
    ]


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _digest(*parts: str) -> str:
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()
