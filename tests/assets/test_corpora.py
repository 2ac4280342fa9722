import gzip
import lzma

import pytest

from assets.corpora import read_documents, write_documents
from assets.data_folders import domains_of, pool_of, protected_rows
from assets.errors import DataFileError

TEXT = "First.\nStill first.\n\nSecond.\n \n\nThird: Grüße.\n"


@pytest.mark.parametrize(("name", "pack"), [("c.txt", bytes), ("c.txt.gz", gzip.compress), ("c.txt.xz", lzma.compress)])
def test_documents_are_what_blank_lines_divide(name, pack, tmp_path):
    path = tmp_path / name
    path.write_bytes(pack(TEXT.encode()))
    assert read_documents(path) == ["First.\nStill first.", "Second.", "Third: Grüße."]


@pytest.mark.parametrize("name", ["c.txt", "c.txt.gz", "c.txt.xz"])
def test_documents_are_read_as_they_were_written(name, tmp_path):
    documents = ["First.\nStill first.", "Second: Grüße."]
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        write_documents(folder / name, documents)
        assert read_documents(folder / name) == documents
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("c.txt.gz", b"plain text", r"c\.txt\.gz: expected gzipped UTF-8 text, got: Not a gzipped file"),
        ("c.txt.xz", b"plain text", r"c\.txt\.xz: expected xz-compressed UTF-8 text, got"),
        ("c.txt.gz", gzip.compress(b"cut off" * 99, mtime=0)[:-9], r"expected gzipped UTF-8 text, got"),
        ("c.txt", b"\xff\xfe", r"expected UTF-8 text, got.*0xff"),
        ("c.txt", b"", r"got 0 bytes without a word"),
        ("c.txt", b" \n\n \n", r"got 5 bytes without a word"),
    ],
)
def test_a_corpus_that_is_no_text_is_named(name, content, said, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataFileError, match=said):
        read_documents(path)


def test_a_corpus_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataFileError, match=r"missing\.txt: expected UTF-8 text, found nothing there"):
        read_documents(tmp_path / "missing.txt")
    with pytest.raises(DataFileError, match="found a folder there"):
        read_documents(tmp_path)


def test_documents_are_taken_evenly_from_the_whole_corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(f"{number:08}" for number in range(100)))
    assert len(read_documents(path, max_bytes=10**6)) == 100
    taken = read_documents(path, max_bytes=200)
    assert sum(len(each) for each in taken) <= 200
    assert [taken[0], taken[-1]] == ["00000000", "00000095"]


def row(name):
    return f'{{"id": "{name}", "instruction": "Say it.", "input": "", "output": "{name}"}}\n'


def test_protected_rows_are_those_of_every_split_of_every_domain(tmp_path):
    for domain in ("web", "code"):
        (tmp_path / domain).mkdir()
        for split in ("train", "validation", "test"):
            (tmp_path / domain / f"{split}.jsonl").write_text(row(f"{domain[0]}{split}"))
    (tmp_path / "notes").mkdir()
    (tmp_path / "public.jsonl").write_text(row("p"))
    assert domains_of(tmp_path) == ["code", "web"]
    assert [each.id for each in protected_rows(tmp_path)] == [
        f"{domain}/{split}:{domain[0]}{split}"
        for domain in ("code", "web")
        for split in ("train", "validation", "test")
    ]
    assert pool_of(tmp_path).name == "public.jsonl"
    (tmp_path / "public_large.jsonl.gz").touch()
    assert pool_of(tmp_path).name == "public_large.jsonl.gz"
    (tmp_path / "web" / "test.jsonl").unlink()
    with pytest.raises(DataFileError, match=r"web/test\.jsonl: expected a data file"):
        protected_rows(tmp_path)


def test_a_folder_without_domains_is_named(tmp_path):
    with pytest.raises(DataFileError, match="expected folders of domains"):
        domains_of(tmp_path)
    with pytest.raises(DataFileError, match="found nothing there"):
        domains_of(tmp_path / "missing")
