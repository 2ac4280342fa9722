import gzip
import json
import unicodedata
from collections import defaultdict
from itertools import combinations, product
from pathlib import Path

import pytest

from command_line.fact_questions import DOMAINS, FRAMES
from command_line.facts import ROWS, Row, corpus_documents, deal, domain_rows, public_rows, write_domains
from cotuning.examples import Example, render_prompt

SPLITS = ("train", "validation", "test", "public")
TASKS = [task for tasks in DOMAINS.values() for task in tasks]


@pytest.fixture(scope="module")
def by_split() -> dict[str, list[Row]]:
    rows = {split: [row for domain in DOMAINS for row in domain_rows(domain, split)] for split in ROWS}
    return {**rows, "public": public_rows()}


def written(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_folder_has_the_format_of_the_users_data_and_is_the_same_every_time(tmp_path):
    assert write_domains(tmp_path / "first") == list(DOMAINS)
    write_domains(tmp_path / "second")
    files = written(tmp_path / "first")
    assert files == written(tmp_path / "second")
    assert set(files) == {f"{domain}/{split}.jsonl" for domain, split in product(DOMAINS, ROWS)} | {
        "public.jsonl",
        "corpus.txt.gz",
    }
    for name, content in files.items():
        if name.endswith(".jsonl"):
            for line in content.decode().splitlines():
                row = json.loads(line)
                assert list(row) == ["id", "domain", "task", "instruction", "input", "output"]
                assert all(isinstance(value, str) and value for value in row.values())


def test_at_least_three_domains_with_the_rows_that_are_said():
    assert len(DOMAINS) >= 3
    for domain in DOMAINS:
        for split, size in ROWS.items():
            rows = domain_rows(domain, split)
            assert 0.8 * size <= len(rows) <= size
            assert {row.task for row in rows} == {task.name for task in DOMAINS[domain]}


def test_no_question_is_in_two_splits_or_twice_in_one(by_split):
    questions = {split: [(row.instruction, row.input) for row in rows] for split, rows in by_split.items()}
    for asked in questions.values():
        assert len(asked) == len(set(asked))
    for first, second in combinations(SPLITS, 2):
        assert not set(questions[first]) & set(questions[second])
    ids = [row.id for rows in by_split.values() for row in rows]
    assert len(ids) == len(set(ids))


def test_every_split_asks_in_wordings_of_its_own(by_split):
    frames = [frame for each in FRAMES.values() for frame in each]
    assert len(frames) == len(set(frames))
    wordings = {split: {row.instruction for row in rows} for split, rows in by_split.items()}
    for first, second in combinations(SPLITS, 2):
        assert not wordings[first] & wordings[second]


def test_no_fact_of_a_devices_rows_is_in_the_public_set_or_the_corpus(by_split):
    corpus = "\n".join(corpus_documents())
    public = {(row.task, row.input) for row in by_split["public"]}
    statement = {task.name: task.statement for task in TASKS}
    for row in by_split["train"]:
        assert (row.task, row.input) not in public
        assert statement[row.task].format(input=row.input, output=row.output) not in corpus


def test_the_corpus_tells_public_facts_and_holds_no_row(by_split):
    corpus = "\n".join(corpus_documents())
    for row in by_split["public"]:
        statement = next(task.statement for task in TASKS if task.name == row.task)
        assert statement.format(input=row.input, output=row.output) in corpus
    for split in SPLITS:
        for row in by_split[split]:
            assert row.instruction not in corpus
            assert render_prompt(None, Example(row.id, row.instruction, row.input, row.output)) not in corpus


@pytest.mark.parametrize("task", [task for task in TASKS if not task.recall], ids=lambda task: task.name)
def test_what_is_tested_of_a_rule_was_nowhere_else(task):
    dealt = deal(task)
    assert sum(len(questions) for questions in dealt.values()) == len(task.questions)
    for first, second in combinations(SPLITS, 2):
        assert not set(dealt[first]) & set(dealt[second])


@pytest.mark.parametrize("task", [task for task in TASKS if task.recall], ids=lambda task: task.name)
def test_a_recall_task_tests_what_the_device_was_told_and_what_the_public_set_tells(task):
    dealt = deal(task)
    assert not set(dealt["public"]) & set(dealt["train"])
    assert set(dealt["test"]) == set(dealt["public"]) | set(dealt["train"])
    asked = [question for question in dealt["test"][:20] if question in set(dealt["train"])]
    assert len(asked) == 10


def test_a_question_has_one_answer():
    for task in TASKS:
        answers = defaultdict(set)
        for question in task.questions:
            answers[question.input].add(question.output)
        assert all(len(each) == 1 for each in answers.values()), task.name


def test_no_text_is_changed_by_a_tokenizers_normalisation(by_split):
    for row in (row for rows in by_split.values() for row in rows):
        for text in (row.instruction, row.input, row.output):
            assert unicodedata.normalize("NFKC", text) == text


@pytest.mark.parametrize(
    ("task", "asked", "answer"),
    [
        ("weekday_after", "Saturday, 3 days later", "Tuesday"),
        ("weekday_after", "Monday, 1 day earlier", "Sunday"),
        ("month_after", "November, 3 months later", "February"),
        ("month_length", "February 2000", "29"),
        ("month_length", "February 2001", "28"),
        ("part_of_day", "05:40", "night"),
        ("larger_unit", "mm or km", "km"),
        ("larger_unit", "GW or MW", "GW"),
        ("unit_quantity", "kilopascal", "pressure"),
        ("status_code", "Not Found", "404"),
        ("status_class", "418", "client error"),
    ],
)
def test_answers_are_right(task, asked, answer):
    questions = next(each.questions for each in TASKS if each.name == task)
    assert {question.output for question in questions if question.input == asked} == {answer}


def test_the_corpus_is_text(tmp_path):
    write_domains(tmp_path)
    text = gzip.decompress((tmp_path / "corpus.txt.gz").read_bytes()).decode()
    documents = text.split("\n\n")
    assert all(each.strip() for each in documents)
    assert 20_000 < len(text) < 1_000_000
