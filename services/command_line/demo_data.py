"""The data of a demo: the project's own domains, or a folder that the user gave in the same format."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from assets.data_folders import SPLITS
from command_line.errors import BadInput

FEWEST_DOMAINS = 1


@dataclass(frozen=True)
class DemoData:
    """A data folder and the domains of it that take part, one a device."""

    folder: Path
    domains: tuple[str, ...]
    given: bool
    """Whether the user gave it; else the project generated it."""

    @property
    def public(self) -> Path:
        """The server's rows."""
        return self.folder / "public.jsonl"

    def split(self, domain: str, split: str) -> Path:
        """One domain's rows of one split."""
        return self.folder / domain / f"{split}.jsonl"


def given_data(folder: Path, domains: Sequence[str]) -> DemoData:
    """Return the user's data after a look at its files; their rows are checked where they are read.

    Raises:
        BadInput: a file is missing, or no domain is named.
    """
    folder = folder.resolve()
    if not folder.is_dir():
        raise BadInput(f"expected a data folder, got {folder}, which is not one")
    found = sorted(each.name for each in folder.iterdir() if (each / "train.jsonl").is_file())
    if len(domains) < FEWEST_DOMAINS:
        raise BadInput(
            f"expected --domains with the folders of {folder} to use, got none",
            next_step=f"choose from: {', '.join(found) or 'no folder there has a train.jsonl'}",
        )
    if repeated := {each for each in domains if domains.count(each) > 1}:
        raise BadInput(f"expected each domain once, got {', '.join(sorted(repeated))} more than once")
    data = DemoData(folder, tuple(domains), given=True)
    files = [data.public, *(data.split(domain, split) for domain in domains for split in SPLITS)]
    if missing := [str(each) for each in files if not each.is_file()]:
        raise BadInput(
            f"expected these files, which are not there: {', '.join(missing)}",
            next_step=f"a data folder holds public.jsonl and, for each domain, {', '.join(SPLITS)}.jsonl;"
            f" domains there: {', '.join(found) or 'none'}",
        )
    return data


def generated_data(folder: Path) -> DemoData:
    """Write the project's own domains under `folder`."""
    from command_line.facts import write_domains

    return DemoData(folder, tuple(write_domains(folder)), given=False)


def write_mix(data: DemoData, path: Path, *, rows_a_domain: int) -> None:
    """Write the first test rows of every domain to one file: what the LLM and the proxy are tested on.

    Raises:
        BadInput: a line is not a JSON object; names the file and the line.
    """
    lines: list[str] = []
    for domain in data.domains:
        source = data.split(domain, "test")
        with open(source, encoding="utf-8") as file:
            for number, line in zip(range(1, rows_a_domain + 1), file, strict=False):
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise BadInput(f"{source}, line {number}: expected a JSON object, got: {error}") from None
                lines.append(json.dumps(row, ensure_ascii=False))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
