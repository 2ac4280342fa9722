"""The gate before base models are trained: nothing that they read holds a private, validation or test row."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from assets.corpora import read_documents
from assets.data import read_examples
from assets.data_folders import PUBLIC_FILE, protected_rows
from assets.errors import DataFileError
from command_line.base_model_recipes import BaseModelsRecipe
from command_line.base_models import PretrainingText
from command_line.errors import BadInput, Contaminated
from command_line.live_view import View
from cotuning.contamination import SHARED_WORDS, Finding, ProtectedRows, text_of

_EXAMPLES = 5
_WORDS = {
    "exact": "equal a row",
    "shared_words": f"share {SHARED_WORDS} words in a row with one",
    "whole": "hold one whole",
}


def without_protected_rows(
    text: PretrainingText, data: Path, recipe: BaseModelsRecipe, *, drop: bool, view: View
) -> PretrainingText:
    """Search what is to be read, and the data's public rows, for the rows of its domains; see `cotuning.contamination`.

    Args:
        text: To be read.
        data: The data folder.
        recipe: Says how much of the corpus is read.
        drop: Leave out what holds a row. Public rows that are not to be read are only told of.
        view: Is told what was found.

    Raises:
        BadInput: a file cannot be read.
        Contaminated: something was found, and is not to be dropped.
    """
    public = data / PUBLIC_FILE
    try:
        protected = ProtectedRows(protected_rows(data))
        in_corpus = _search_corpus(protected, text.corpus, recipe.corpus_bytes, view) if text.corpus else []
        in_pools = [_search_rows(protected, path, view) for path in text.pools]
        told_only = [public] if public.is_file() and public not in text.pools else []
        in_public = [finding for path in told_only for finding in _search_rows(protected, path, view)]
    except DataFileError as error:
        raise BadInput(str(error)) from None
    found = len(in_corpus) + sum(map(len, in_pools))
    if (found or in_public) and not drop:
        raise Contaminated(
            f"expected text without any of the {protected.num_rows} private, validation and test rows of {data}, got "
            f"{len(in_corpus)} documents, {sum(map(len, in_pools))} rows of the pool and {len(in_public)} other public "
            "rows that hold one",
            next_step="--drop-contaminated leaves the documents and the rows of the pool out",
        )
    if found:
        view.say(f"left out: {len(in_corpus)} documents and {sum(map(len, in_pools))} rows")
    return replace(
        text,
        dropped_documents=tuple(each.place for each in in_corpus),
        dropped_rows=tuple(tuple(each.place for each in findings) for findings in in_pools),
    )


def _search_corpus(protected: ProtectedRows, path: Path, max_bytes: int, view: View) -> list[Finding]:
    documents = read_documents(path, max_bytes=max_bytes)
    return _search(protected, documents, [f"document {place}" for place in range(len(documents))], path, view)


def _search_rows(protected: ProtectedRows, path: Path, view: View) -> list[Finding]:
    rows = read_examples(path)
    return _search(protected, [text_of(row) for row in rows], [row.id for row in rows], path, view)


def _search(
    protected: ProtectedRows, texts: Sequence[str], names: Sequence[str], path: Path, view: View
) -> list[Finding]:
    """What was found in the texts of a file, told with counts and the names of some examples."""
    label = f"searching {path.name}"
    findings = list(protected.find_all(texts, lambda done, total: view.progress(label, done, total)))
    kinds = Counter(each.kind for each in findings)
    told = ", ".join(f"{count} {_WORDS[kind]}" for kind, count in sorted(kinds.items())) or "none holds a row"
    view.say(f"{path.name}: {len(texts)} texts searched; {told}")
    for each in findings[:: max(1, len(findings) // _EXAMPLES)][:_EXAMPLES]:
        view.say(f"  {path.name}: {names[each.place]} holds {each.row}: {each.words[:100]}")
    return findings
