"""A folder of rows by domain, as experiments use it.

<folder>/<domain>/{train,validation,test}.jsonl     one device's private rows, and what it is tested on
<folder>/public.jsonl                               what the server may see
<folder>/public_large.jsonl.gz                      optional: more of the kind, for pretraining
"""

from dataclasses import replace
from pathlib import Path

from assets.data import read_examples
from assets.errors import DataFileError
from cotuning.examples import Example

SPLITS = ("train", "validation", "test")
PUBLIC_FILE = "public.jsonl"
LARGE_POOL_FILE = "public_large.jsonl.gz"


def domains_of(folder: Path) -> list[str]:
    """Names of the domains: folders with at least one split, in order.

    Raises:
        DataFileError: there is no such folder, or no domain in it.
    """
    if not folder.is_dir():
        raise DataFileError(
            f"{folder}: expected a data folder, found {'a file' if folder.exists() else 'nothing'} there"
        )
    found = sorted(each.name for each in folder.iterdir() if any((each / f"{name}.jsonl").is_file() for name in SPLITS))
    if not found:
        raise DataFileError(f"{folder}: expected folders of domains with {', '.join(SPLITS)}.jsonl, found none")
    return found


def protected_rows(folder: Path) -> list[Example]:
    """The rows of every split of every domain: no model may have seen one before. Ids say where: `code/test:<id>`.

    Raises:
        DataFileError: a split is missing, or a row cannot be read.
    """
    return [
        replace(row, id=f"{domain}/{split}:{row.id}")
        for domain in domains_of(folder)
        for split in SPLITS
        for row in read_examples(folder / domain / f"{split}.jsonl")
    ]


def pool_of(folder: Path) -> Path:
    """The file of public rows that base models may read: the large pool if there is one, else the server's rows."""
    large = folder / LARGE_POOL_FILE
    return large if large.is_file() else folder / PUBLIC_FILE
