"""Save and restore what a Cotune cloud remembers: the database, and the files that it names (blobs).

    python3 scripts/backup.py save FOLDER                        of the deployment of docker-compose.yml, while it runs
    python3 scripts/backup.py restore FOLDER                     into one that is up and empty; then `up` again
    python3 scripts/backup.py save FOLDER --home ~/.local/share/cotune      of `cotune up`, while it runs
    python3 scripts/backup.py restore FOLDER --home ...                     into a home that nothing uses
    python3 scripts/backup.py check FOLDER                       whether every file of the backup is what its name says

Blobs are named by their SHA-256 and never change: into a FOLDER with an older backup only new ones are copied. The
database is saved first, so that every file that it names is there when the files are copied. Needs Python only.
"""

import argparse
import hashlib
import os
import shlex
import shutil
import sqlite3
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import IO

DUMP, SQLITE = "database.dump", "cotune.sqlite3"
BLOBS_INSIDE = "/var/lib/cotune-blobs"
CHUNK_BYTES = 2**20


class CannotDo(Exception):
    """The message says what was expected and what came."""


def save_home(home: Path, folder: Path) -> None:
    """Save an embedded cloud; it may run meanwhile."""
    source = home / SQLITE
    if not source.is_file():
        raise CannotDo(f"expected a database in {source}, found none")
    new = folder / f"{SQLITE}.new"
    new.unlink(missing_ok=True)
    # SQLite's own backup: consistent while others write, and with the newest rows, which are in the log beside it.
    with closing(sqlite3.connect(f"file:{source}?mode=ro", uri=True)) as old, closing(sqlite3.connect(new)) as copy:
        old.backup(copy)
    new.replace(folder / SQLITE)
    for name in blobs_in(home / "blobs" / "objects") - blobs_in(folder / "objects"):
        copy_file(home / "blobs" / "objects" / name[:2] / name, folder / "objects" / name[:2] / name)


def restore_home(folder: Path, home: Path) -> None:
    """Restore an embedded cloud into a home without a database."""
    if (home / SQLITE).exists():
        raise CannotDo(f"expected a home without a database, found {home / SQLITE}: move it away first")
    if not (folder / SQLITE).is_file():
        raise CannotDo(f"expected {folder / SQLITE}, found none")
    check(folder)
    for name in blobs_in(folder / "objects") - blobs_in(home / "blobs" / "objects"):
        copy_file(folder / "objects" / name[:2] / name, home / "blobs" / "objects" / name[:2] / name)
    copy_file(folder / SQLITE, home / SQLITE)


def save_compose(compose: Sequence[str], folder: Path) -> None:
    """Save a running deployment."""
    with (folder / f"{DUMP}.new").open("wb") as file:
        run([*compose, "exec", "-T", "database", "pg_dump", "-U", "cotune", "-Fc", "cotune"], stdout=file)
    (folder / f"{DUMP}.new").replace(folder / DUMP)
    inside = [*compose, "exec", "-T", "api"]
    if store := object_store(compose):
        sys.stderr.write(f"backup: the files are in {store}: copy them now, after the database\n")
        return
    listing = run([*inside, "find", f"{BLOBS_INSIDE}/objects", "-type", "f"], stdout=subprocess.PIPE).decode()
    missing = {Path(line).name for line in listing.split()} - blobs_in(folder / "objects")
    for some in batches(sorted(missing)):
        names = [f"objects/{name[:2]}/{name}" for name in some]
        # Beside the objects, not among them: a copy that is cut leaves no half file under a good name.
        arriving = folder / "arriving"
        arriving.mkdir(exist_ok=True)
        with subprocess.Popen([*inside, "tar", "-C", BLOBS_INSIDE, "-cf", "-", *names], stdout=subprocess.PIPE) as tar:
            assert tar.stdout is not None
            unpack(tar.stdout, arriving)
        if tar.returncode != 0:
            raise CannotDo(f"expected the deployment's files, tar ended with {tar.returncode}")
        for name in some:
            (folder / "objects" / name[:2]).mkdir(parents=True, exist_ok=True)
            (arriving / "objects" / name[:2] / name).replace(folder / "objects" / name[:2] / name)
        shutil.rmtree(arriving)


def restore_compose(compose: Sequence[str], folder: Path) -> None:
    """Restore into a deployment that is up and has no run yet. It is left with the cloud stopped: bring it up again."""
    if not (folder / DUMP).is_file():
        raise CannotDo(f"expected {folder / DUMP}, found none")
    check(folder)
    database = [*compose, "exec", "-T", "database"]
    runs = run([*database, "psql", "-U", "cotune", "-Atc", "SELECT count(*) FROM runs"], stdout=subprocess.PIPE)
    if int(runs) != 0:
        raise CannotDo(f"expected a deployment without runs, this one has {int(runs)}: empty it first, if you mean it")
    if store := object_store(compose):
        sys.stderr.write(f"backup: the files are to be in {store}: this restores the database only\n")
    else:
        put_files(compose, folder)
    run([*compose, "stop", "api", "worker", "controller"])
    # A new database: the dump may be of an older schema than the one that this release has made.
    run([*database, "dropdb", "-U", "cotune", "--force", "cotune"])
    run([*database, "createdb", "-U", "cotune", "cotune"])
    with (folder / DUMP).open("rb") as file:
        restore = ["pg_restore", "-U", "cotune", "-d", "cotune", "--single-transaction", "--exit-on-error"]
        run([*database, *restore], stdin=file)


def object_store(compose: Sequence[str]) -> str | None:
    """Where a deployment's files are, if not in its volume."""
    blobs = run([*compose, "exec", "-T", "api", "printenv", "COTUNE_BLOBS"], stdout=subprocess.PIPE).decode().strip()
    return blobs if blobs.startswith("s3://") else None


def put_files(compose: Sequence[str], folder: Path) -> None:
    """Put the files of a backup into a deployment's volume."""
    put = [*compose, "exec", "-T", "api", "tar", "-C", BLOBS_INSIDE, "-xf", "-"]
    with subprocess.Popen(put, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        with tarfile.open(fileobj=process.stdin, mode="w|") as tar:
            for name in sorted(blobs_in(folder / "objects")):
                tar.add(folder / "objects" / name[:2] / name, f"objects/{name[:2]}/{name}", filter=ours)
        process.stdin.close()
    if process.returncode != 0:
        raise CannotDo(f"expected the files to be taken, tar ended with {process.returncode}")


def check(folder: Path) -> int:
    """Return how many files the backup holds, after reading each."""
    names = blobs_in(folder / "objects")
    for name in names:
        with (folder / "objects" / name[:2] / name).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != name:
            raise CannotDo(f"expected a file with SHA-256 {name} under that name, this one has {found}")
    return len(names)


def blobs_in(objects: Path) -> set[str]:
    """The names of the files of a blob store or of a backup."""
    return {each.name for each in objects.glob("??/*") if len(each.name) == 64}


def copy_file(source: Path, target: Path) -> None:
    """Copy a file so that it is there whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    new = target.with_name(f"{target.name}.new")
    shutil.copyfile(source, new)
    with new.open("rb") as file:
        os.fsync(file.fileno())
    new.replace(target)


def unpack(stream: IO[bytes], folder: Path) -> None:
    """Unpack the regular files of a tar that is being written."""
    with tarfile.open(fileobj=stream, mode="r|") as tar:
        for member in tar:
            content = tar.extractfile(member)
            if content is None or ".." in Path(member.name).parts or member.name.startswith("/"):
                continue
            (folder / member.name).parent.mkdir(parents=True, exist_ok=True)
            with content, (folder / member.name).open("wb") as file:
                shutil.copyfileobj(content, file, CHUNK_BYTES)
                os.fsync(file.fileno())


def ours(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """The member as the containers' user is to own it."""
    member.uid = member.gid = 10001
    member.uname = member.gname = ""
    member.mode = 0o600
    return member


def batches(names: Sequence[str], size: int = 500) -> Iterator[Sequence[str]]:
    """Parts short enough for a command line."""
    for start in range(0, len(names), size):
        yield names[start : start + size]


def run(command: Sequence[str], **streams: int | IO[bytes]) -> bytes:
    """Run a command; return what it wrote if its output was asked for."""
    done = subprocess.run(command, check=False, **streams)  # type: ignore[call-overload]
    if done.returncode != 0:
        raise CannotDo(f"expected `{shlex.join(command)}` to succeed, it ended with {done.returncode}")
    return bytes(done.stdout or b"")


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["save", "restore", "check"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--home", type=Path, help="of an embedded cloud (`cotune up`)")
    parser.add_argument("--compose", default="docker compose", help="the command that the deployment is run with")
    options = parser.parse_args(arguments)
    folder: Path = options.folder.absolute()
    compose = shlex.split(options.compose)
    try:
        if options.action == "save":
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            save_home(options.home, folder) if options.home else save_compose(compose, folder)
        elif options.action == "restore":
            restore_home(folder, options.home) if options.home else restore_compose(compose, folder)
        elif not folder.is_dir():
            raise CannotDo(f"expected the folder of a backup, got {folder}")
        number = check(folder)
    except (CannotDo, OSError, sqlite3.Error, tarfile.TarError) as error:
        sys.stderr.write(f"backup: {error}\n")
        return 1
    sys.stdout.write(f"{options.action}: the database and {number} files, each with the content that its name says\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
