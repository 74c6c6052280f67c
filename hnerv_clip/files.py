"""Files read and written in one way: UTF-8, atomic, checked; errors name the file and the fix."""

from __future__ import annotations

import errno
import hashlib
import json
import lzma
import os
import platform
import re
import tarfile
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    import pandas as pd  # half a second, which `hnerv-clip settings` need not wait for

NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)  # 0 on systems without it

FIXES = {
    errno.EACCES: "make it readable and writable for you, or choose another path",
    errno.EPERM: "make it readable and writable for you, or choose another path",
    errno.EROFS: "that disk is read-only: choose another path",
    errno.ENOSPC: "free space there, then run the same command again",
    errno.EDQUOT: "free some of your quota there, then run the same command again",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), then run the same command again",
    errno.ENOENT: "correct the path",
    errno.EEXIST: "a file stands there: choose another path, or remove it",
    errno.ENOTDIR: "a part of that path is a file, where a folder is needed: choose another path",
    errno.EISDIR: "that is a folder, where a file is needed: choose another path",
    errno.ENAMETOOLONG: "choose a shorter name (most disks take 255 bytes a name)",
    errno.ELOOP: "that is a symbolic link, which is not followed here: remove it, or put the file "
                 "itself in its place",
    errno.EMFILE: "raise the limit on open files (ulimit -n), then run the same command again",
    errno.EIO: "the disk or network drive fails: look at its state, then try again",
    errno.ESTALE: "the network drive was remounted: run the same command again",
}


class RunError(RuntimeError):
    """A run directory, checkpoint or other file can't be used as asked; the message says the fix.
    """


def explain(error: OSError) -> str:
    """What the system refused, in one sentence: the file, the reason and the fix."""
    reason = error.strerror or str(error) or type(error).__name__
    file = error.filename2 if error.errno == errno.EEXIST and error.filename2 else error.filename
    where = f"{os.fsdecode(file)}: " if isinstance(file, (str, bytes, os.PathLike)) else ""
    fix = FIXES.get(error.errno)
    return f"{where}{reason}" + (f"; {fix}" if fix else "")


def write_atomic(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file so that at any moment either the old or the new content is there, whole.

    The name of the temporary file says which process of which machine makes it, so that
    `remove_stale` knows what a killed one left.

    Raises:
        RunError: the disk is full or read-only, or a folder stands there; what stood there before
            is intact.
    """
    writer = f"{platform.node()}.{os.getpid()}-{threading.get_ident()}"
    temporary = path.with_name(f".{path.name}.{writer}.tmp")
    try:
        with open_own(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into RuntimeError
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        number = getattr(error, "errno", None)
        said = f"{error.strerror}; {FIXES[number]}" if number in FIXES else str(error)
        raise RunError(f"cannot write {path}: {said}. What stood there before is intact; free "
                       "space or make the folder writable, then run again to resume") from error
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_atomic(path, lambda file: file.write(text.encode()))


def remove_stale(folder: Path) -> None:
    """Remove the temporary files of `write_atomic` whose process is gone.

    Those of another machine are taken for such after a day.
    """
    own = re.compile(rf"\..+\.{re.escape(platform.node())}\.(\d+)-\d+\.tmp")
    for path in folder.glob(".*.tmp"):
        with suppress(OSError):
            made_here = own.fullmatch(path.name)
            if not psutil.pid_exists(int(made_here[1])) if made_here else \
                    time.time() - path.lstat().st_mtime > 24 * 3600:
                path.unlink(missing_ok=True)


def open_own(path: Path, mode: str, **options: Any) -> IO[Any]:
    """Open a file to write, but never what a symbolic link of that name leads to."""
    return open(path, mode, opener=lambda name, flags: os.open(name, flags | NO_FOLLOW, 0o666),
                encoding=None if "b" in mode else "utf-8", **options)


def read_json(path: Path, *, keys: Mapping[str, Any] | None = None, fix: str) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Args:
        keys: {name: type or tuple of types} of what it must hold.
        fix: what to do about a damaged one, which the error says.
    Raises:
        FileNotFoundError: there is none.
        RunError: not JSON, no object, or a key is missing or of another type.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise RunError(f"{path} is damaged: it is no JSON ({error}); {fix}") from error
    if not isinstance(content, dict):
        raise RunError(f"{path} is damaged: it holds {json.dumps(content)[:40]}, not an object; "
                       f"{fix}")
    check_keys(content, keys or {}, path, fix=fix)
    return content


def check_keys(content: Mapping[str, Any], keys: Mapping[str, Any], path: Path, *, fix: str
               ) -> None:
    """Raise RunError unless `content` of the file `path` holds these keys of these types."""
    for name, kinds in keys.items():
        if name not in content:
            raise RunError(f"{path} is damaged: it lacks {name}; {fix}")
        value, kinds = content[name], kinds if isinstance(kinds, tuple) else (kinds,)
        if not isinstance(value, kinds) or isinstance(value, bool) and bool not in kinds:
            raise RunError(f"{path} is damaged: its {name} is {str(value)[:40]!r}; {fix}")


def read_table(path: Path, columns: Iterable[str] = (), *, fix: str, **options: Any
               ) -> pd.DataFrame:
    """Read a CSV file.

    Args:
        columns: names that it must have; it may have more.
        fix: what to do about a damaged one, which the error says.
        options: of `pandas.read_csv`.
    Raises:
        FileNotFoundError: there is none.
        RunError: empty, not CSV, or a column is missing.
    """
    import pandas as pd

    if tuple(map(int, pd.__version__.split(".")[:2])) < (3, 1):  # then it is the default
        options["float_precision"] = "round_trip"
    try:
        table = pd.read_csv(path, encoding="utf-8", **options)
    except ValueError as error:  # pandas' own errors are ValueErrors
        raise RunError(f"{path} is damaged: {str(error).strip()}; {fix}") from error
    missing = [name for name in columns if name not in table]
    if missing:
        raise RunError(f"{path} is damaged: it lacks the columns {', '.join(missing)}; {fix}")
    return table


def check_writable(folder: Path) -> None:
    """Raise RunError unless files can be written in a folder, which need not exist yet.

    It leaves nothing behind. Ask before long work, not after.
    """
    try:
        with suppress(FileNotFoundError):
            os.lstat(folder)  # refuses names that are too long, and folders within a file
        there = folder
        while not there.exists():
            there = there.parent
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise RunError(f"cannot write to {folder}: {explain(error)}") from error


def check_free(path: Path, *, force: bool = False) -> None:
    """Refuse to replace what is there.

    Args:
        path: of a file or folder that is going to be written.
        force: replace it all the same, as the command was told by --force.
    Raises:
        RunError: it exists, and `force` is not set.
    """
    if path.exists() and not force:
        raise RunError(f"{path} exists; choose another name, or add --force to replace it")


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def open_archive(path: Path) -> Iterator[tarfile.TarFile]:
    """A tar archive to read, compressed or not.

    Raises:
        RunError: it is none, or is damaged, which may show only while it is read.
    """
    try:
        with tarfile.open(path) as archive:
            yield archive
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError) as error:
        raise RunError(f"{path} is no tar archive that can be read ({error}); choose another "
                       "file, or remove it") from error


def unpack(path: Path, folder: Path) -> None:
    """Unpack a tar archive of plain files and folders.

    Raises:
        RunError: it is none, or has a link or a device, or a name that leads out of the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open_archive(path) as archive:
        for member in archive:
            inside = (folder / member.name).resolve().is_relative_to(folder.resolve())
            if not inside or not (member.isfile() or member.isdir()):
                raise RunError(f"{path} has {member.name!r}, which is no plain file within "
                               f"{folder}: nothing is unpacked; make the archive again")
        # Python has this filter since 3.11.4, and warns without it since 3.12
        options = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(folder, **options)
