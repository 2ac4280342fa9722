"""What the building of base models reads, divided into what is trained on and what is measured on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from assets.corpora import read_documents
from assets.data import read_examples
from cotuning.examples import Example

Item = TypeVar("Item")


class UnfitText(ValueError):
    """The text cannot give what the recipe asks for."""


@dataclass(frozen=True)
class Texts:
    """Documents of the corpus and rows of the pools."""

    documents: Sequence[str]
    rows: Sequence[Example]
    held_out_documents: Sequence[str] = ()
    held_out_rows: Sequence[Example] = ()


def read_texts(job: dict[str, Any]) -> Texts:
    """Read the corpus and the pools, leave out what is to be dropped, and put aside what is held out.

    Raises:
        DataFileError: a file cannot be read.
        UnfitText: nothing is left to train on.
    """
    text, shared = job["text"], job["shared"]
    documents: Sequence[str] = []
    if text["corpus"]:
        documents = read_documents(Path(text["corpus"]), max_bytes=shared["corpus_bytes"])
        documents = without(documents, text["dropped_documents"])
    rows: list[Example] = []
    for place, pool in enumerate(text["pools"]):
        dropped = text["dropped_rows"][place] if text["dropped_rows"] else []
        rows.extend(without(read_examples(pool), dropped))
    total = sum(len(each.encode()) for each in documents)
    count = round(len(documents) * min(1.0, shared["held_out_bytes"] / total)) if total else 0
    held_documents, documents = put_aside(documents, count)
    held_rows, kept_rows = put_aside(rows, shared["held_out_rows"])
    if not (documents or kept_rows):
        raise UnfitText(
            f"expected text to train on, got {len(held_documents)} documents and {len(held_rows)} rows, all of which "
            "are held out; give more, or lower held_out_bytes and held_out_rows"
        )
    return Texts(documents, kept_rows, held_documents, held_rows)


def without(items: Sequence[Item], places: Sequence[int]) -> Sequence[Item]:
    """The items that are not at one of `places`."""
    dropped = set(places)
    return [item for place, item in enumerate(items) if place not in dropped] if dropped else items


def put_aside(items: Sequence[Item], count: int) -> tuple[Sequence[Item], Sequence[Item]]:
    """`count` of the items, taken evenly from all of them, and the others."""
    count = min(count, len(items))
    places = [index * len(items) // count for index in range(count)]
    return [items[place] for place in places], without(items, places)
