"""The base models of the benchmark of quality: built as `cotune pretrain` builds them, and found where they are there.

They read nothing of the domains that only devices hold, as far as it can be told: no row of the pool of those tasks,
and no document of the corpus that has the instruction of one of them or ends with one of their labels. Documents that
tell such a row in another form remain.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from assets.corpora import read_documents
from assets.data import read_examples
from assets.data_folders import SPLITS, pool_of
from assets.errors import DataFileError
from benchmarks.quality_settings import Preset
from command_line.base_model_recipes import BaseModelsRecipe
from command_line.base_models import PretrainingText, ensure_base_models, find_base_models
from command_line.contamination_gate import without_protected_rows
from command_line.errors import BadInput
from command_line.live_view import View
from cotuning.examples import Example
from simulation.base_models import model_problems

_LABEL_ROWS = 5
"""An answer of two words or more that so many rows have is a label."""


def text_of(preset: Preset, data: Path, hidden: Collection[str], view: View) -> PretrainingText:
    """What the base models read, without protected rows and without what is known to be of hidden domains.

    Args:
        preset: says which corpus, and how much of it.
        data: the data folder.
        hidden: domains that only devices hold.
        view: told what is left out.

    Raises:
        BadInput: a file is missing or cannot be read.
    """
    corpus, pool = data / preset.size.corpus, pool_of(data)
    for path in (corpus, pool):
        if not path.is_file():
            raise BadInput(f"expected what the base models read at {path}, found no file")
    view.step("Looking for rows of the data in what the base models read")
    text = without_protected_rows(PretrainingText(corpus, (pool,)), data, preset.recipe, drop=True, view=view)
    if not hidden:
        return text
    try:
        rows = [row for name in hidden for split in SPLITS for row in read_examples(data / name / f"{split}.jsonl")]
        documents = read_documents(corpus, max_bytes=preset.recipe.corpus_bytes)
        pooled = read_examples(pool)
    except DataFileError as error:
        raise BadInput(str(error)) from None
    of_documents = documents_of(documents, rows, pooled)
    of_rows = [place for place, row in enumerate(pooled) if row.task in {each.task for each in rows}]
    view.say(f"left out, of {', '.join(hidden)}: {len(of_documents)} documents and {len(of_rows)} rows of the pool")
    return replace(
        text,
        dropped_documents=tuple(sorted({*text.dropped_documents, *of_documents})),
        dropped_rows=(tuple(sorted({*text.dropped_rows[0], *of_rows})),),
    )


def documents_of(documents: Sequence[str], rows: Sequence[Example], others: Sequence[Example]) -> list[int]:
    """Places of documents that are told to be of the tasks of `rows`.

    Args:
        documents: of a corpus.
        rows: of hidden domains.
        others: rows of these and of other tasks; an instruction that one of other tasks has says nothing.
    """
    tasks = {row.task for row in rows}
    shared = {row.instruction for row in others if row.task not in tasks}
    instructions = {row.instruction for row in rows} - shared
    answers = Counter(row.output for row in rows)
    labels = {answer for answer, count in answers.items() if count >= _LABEL_ROWS and len(answer.split()) > 1}
    return [
        place
        for place, document in enumerate(documents)
        if _last_line(document) in labels or any(each in document for each in instructions)
    ]


def _last_line(document: str) -> str:
    line = document.rstrip().rpartition("\n")[2]
    return line.removeprefix("Output:").removeprefix("Answer:").strip()


def check_built(preset: Preset, text: PretrainingText, root: Path, longest_row: int) -> None:
    """Look at the base models that are there already.

    Raises:
        BadInput: one cannot be used, or none of this recipe could read so long rows.
    """
    if preset.recipe.positions < longest_row:
        raise BadInput(
            f"{preset.name}: expected a recipe of base models that read {longest_row} tokens, it says `positions` "
            f"{preset.recipe.positions}"
        )
    for seed in preset.size.base_seeds:
        there = [str(each) for each in find_base_models(text, root, preset.recipe_of(seed)).all if each.exists()]
        if problems := model_problems(there, longest_row=longest_row):
            raise BadInput("; ".join(problems), next_step=f"remove the folder in {root} to have it built again")


def build(recipe: BaseModelsRecipe, text: PretrainingText, root: Path, view: View, *, command: str) -> dict[str, Path]:
    """Each model of the recipe with its folder, after building those that are not there; an interrupted one goes on.

    Raises:
        BadInput, ProcessFailed: see `ensure_base_models`.
    """
    known = find_base_models(text, root, recipe)
    missing = sum(not each.exists() for each in known.all)
    view.step(f"Base models, seed {recipe.seed}: {missing} to train, {len(known.all) - missing} there already")
    made = ensure_base_models(text, root, recipe, view.progress, command=command, on_note=view.say)
    return {model.name: folder for model, folder in zip(recipe.models, made.all, strict=True)}
