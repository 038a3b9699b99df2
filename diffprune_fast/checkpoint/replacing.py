"""A set of files in a folder, replaced as one: whoever reads it, at any moment, finds the old set or the new.

The new files are written into a hidden folder inside, and reach the disk. One rename gives that folder the name
``COMMIT``: from then on what it holds stands for the files beside it. Then they are moved out, one by one, and it goes.
A process that is killed leaves the old set (and a hidden folder that the next save removes) or the new one (partly in
``COMMIT``, which the next save empties).
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

STAGED = ".diffprune-"
COMMIT = ".diffprune.commit"


def place_of(directory: Path, name: str) -> Path:
    """Where a file of the set is; it needn't exist."""
    waiting = directory / COMMIT / name
    return waiting if waiting.exists() else directory / name


@dataclass(frozen=True)
class FileSet:
    """The names of a set of files, or patterns of such.

    first: always there, and moved first. describes: what readers with rules of their own read ``last`` by; where it
    changes, ``last`` is away until it comes: they find the set incomplete, never mixed. others: the rest.
    """

    first: str
    describes: str
    last: tuple[str, ...]
    others: tuple[str, ...] = ()

    @property
    def patterns(self) -> tuple[str, ...]:
        """Of all that is of this set alone."""
        return (self.first, *self.last, *self.others)


def replace_files(directory: Path, files: FileSet, write: Callable[[Path], None]) -> None:
    """Replace the set in ``directory``, which is made if need be, by what ``write(folder)`` makes of it.

    Raises OSError from the disk, and whatever ``write`` raises; the old files are untouched then.
    """
    created = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    with _alone_in(directory):
        _finish(directory, files)
        for litter in directory.glob(f"{STAGED}*"):
            shutil.rmtree(litter, ignore_errors=True)
        staged = Path(tempfile.mkdtemp(prefix=STAGED, dir=directory))
        try:
            write(staged)
            for path in staged.iterdir():
                _to_disk(path)
            staged.chmod(directory.stat().st_mode & 0o777)
            _to_disk(staged)
            staged.rename(directory / COMMIT)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            if created:
                with suppress(OSError):
                    directory.rmdir()
            raise
        _to_disk(directory)
        _finish(directory, files)


def _finish(directory: Path, files: FileSet) -> None:
    """Move what waits in ``COMMIT`` to its place. Whatever is there is seen as new already."""
    commit = directory / COMMIT
    if not commit.is_dir():
        return
    waiting = {path.name for path in commit.iterdir()}
    if files.first in waiting:  # nothing has been moved yet
        changed = not _same(commit / files.describes, directory / files.describes)
        for path in [path for pattern in (*files.last, *files.others) for path in directory.glob(pattern)]:
            if path.name not in waiting or (changed and _is_one(path.name, files.last)):
                path.unlink(missing_ok=True)
    for name in sorted(waiting, key=lambda n: (n != files.first, _is_one(n, files.last))):
        os.replace(commit / name, directory / name)
    commit.rmdir()
    _to_disk(directory)


def _is_one(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _same(one: Path, two: Path) -> bool:
    return one.is_file() and two.is_file() and one.read_bytes() == two.read_bytes()


def _to_disk(path: Path) -> None:
    """A file's bytes, or a folder's names; not every system has the latter."""
    try:
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except PermissionError:
        if path.is_dir():  # Windows
            return
        raise
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """Ranks that all save to one folder do it one after another. The lock goes with the process, and leaves no file."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
