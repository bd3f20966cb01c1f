"""Files and folders that a kill leaves as they were or complete, JSON files of users, and locks between processes.

Everything is written under a draft's name beside the final one, and gets the final name by one rename.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

OF_A_RUN = ("checkpoints", "metrics.jsonl", "index.json")
"""What only the folder of a run, or of a checkpoint, holds."""
FILES_OF_A_RUN = ("metrics.jsonl", "summary.json", "config.json", "index.json", "heartbeat.json", "DONE")


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk that takes no more."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError that names no file, as that of a full disk, names this one."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:  # else it has a text of its own
            error.filename = str(path)
        raise


@contextmanager
def replacing(path: Path, *, durable: bool = True, shared: bool = False) -> Iterator[Path]:
    """The path of a draft to write, which replaces the file at `path` at the end; an exception deletes it.

    Args:
        path: of the file; its folder exists.
        durable: whether to wait until the content and the name are on disk. Otherwise a power cut may lose both.
        shared: whether several processes may write the file at once: the draft's name is then random. Otherwise it is
            the same every time, so that drafts of killed processes do not add up.
    """
    draft = draft_of(path) if shared else path.with_name(f"{path.name}.tmp")
    try:
        with naming(draft):
            yield draft
            if durable:
                sync(draft)
        os.replace(draft, path)
    except Exception:
        draft.unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)


def replace_text(path: Path, text: str, *, durable: bool = True, shared: bool = False) -> None:
    """Write a file in UTF-8; for the rest, see `replacing`. Raises OSError as the file system does."""
    with replacing(path, durable=durable, shared=shared) as draft:
        draft.write_text(text, encoding="utf-8")


def expanded(path: str | Path) -> Path:
    """The path with a home folder for its ~. ValueError where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: no home folder is known for its ~; write the path out") from error


def refuse_output(path: Path, *, folder: bool, option: str = "--output") -> None:
    """ValueError where no folder, or no file, can be written at `path`; tried, and nothing is left there.

    Trying is the only test: root may write to a file system that is read-only, full, or none at all (/proc).
    """
    for place in (path, *path.absolute().parents):
        if place.is_symlink() and not place.exists():
            raise ValueError(f"{option} {path}: {place} is a link to nothing; remove the link, or choose another")
    if path.exists() and path.is_dir() != folder:
        found, wanted = ("file", "folder") if folder else ("folder", "file")
        raise ValueError(f"{option} {path} is a {found}; name a {wanted}")
    nearest = path.absolute() if folder else path.absolute().parent
    parent = next(above for above in (nearest, *nearest.parents) if above.exists())
    try:
        with TemporaryDirectory(prefix=".mpl_scale-", dir=parent):
            pass
    except OSError as error:
        raise ValueError(
            f"{option} {path}: nothing can be written to {parent}: {error.strerror}; choose another"
        ) from error


def refuse_inside(path: Path, root: Path, *, option: str = "--output") -> None:
    """ValueError where a command would write its folder among the files of the data set below `root`."""
    inside, outer = os.path.realpath(path), os.path.realpath(root)
    if os.path.commonpath([inside, outer]) == outer:
        raise ValueError(
            f"{option} {path} lies in the data set {root}, whose images it would mix with; name a folder outside it"
        )


def refuse_run(path: Path, *, option: str = "--output") -> None:
    """ValueError where results of a command would lie among, or in place of, the files of a run or a checkpoint."""
    folder = path.parent if path.name in FILES_OF_A_RUN else path
    for name in OF_A_RUN:
        if (folder / name).exists():
            raise ValueError(
                f"{option} {path}: {folder} holds a run or a checkpoint ({name}), whose files it might replace; choose "
                "another"
            )


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """An empty folder to fill, which replaces the one at `path` at the end, on disk; an exception deletes it.

    An older folder is deleted only after that, and processes that have its files open keep them.
    """
    draft, old = path.with_name(f"{path.name}.writing"), path.with_name(f"{path.name}.old")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        with naming(draft):
            yield draft
        for written in [*draft.rglob("*"), draft]:
            sync(written)
    except Exception:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    draft.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def read_object(path: Path, *, fix: str) -> dict[str, Any]:
    """The JSON object in a file. ValueError with the path, what is wrong with it and the fix."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; {fix}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}; {fix}") from None
    if not isinstance(document, dict):
        raise ValueError(f"{path}: a JSON object is expected, not a {type(document).__name__}; {fix}")
    return document


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8 and wait until its content is on disk."""
    with naming(path):
        path.write_text(text, encoding="utf-8")
    sync(path)


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy. numpy.save leaves a file that is cut short, and raises nothing, where the disk is full."""
    import numpy as np

    whole = np.ascontiguousarray(array)
    with naming(path), path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(whole))
        file.write(whole.tobytes())


def create_array(path: Path, *, dtype: str | np.dtype[Any], shape: tuple[int, ...]) -> np.memmap[Any, Any]:
    """A new .npy on disk, zeros, memory-mapped.

    Its room is taken at once: where the disk is full that is an OSError, and not a signal that ends the process later.
    """
    import numpy as np

    with naming(path):
        array = np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(dtype), shape=shape)
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def draft_of(path: Path) -> Path:
    """A random name beside `path`: its own, `.tmp-` and eight hexadecimal digits."""
    return path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")


def lock(path: Path, *, wait: bool = True) -> IO[str]:
    """Take the operating system's lock (flock) of a file, which is made; held until it is closed or the process ends.

    Args:
        path: of the file; its folder exists.
        wait: for the process that has the lock; False: BlockingIOError where there is one.
    """
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        file.close()
        raise
    return file
