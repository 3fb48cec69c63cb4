"""Files that are whole or absent: written under a temporary name, synced, then renamed."""

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tl_neuron_attr.errors import InputError, OutputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_STALE_SECONDS = 3600


def check_writable(directory: str | os.PathLike[str]) -> Path:
    """``directory`` as a path, after a look whether files could be made there; makes nothing.

    Raises:
        InputError: If it is a file, lies below one, or may not be written to.
    """
    path = Path(directory)
    place = path
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise InputError(f"cannot write to {str(path)!r}: {str(place)!r} is not a directory")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"cannot write to {str(path)!r}: no permission; choose another directory")
    return path


def check_file(path: str | os.PathLike[str], example: str) -> Path:
    """``path`` as a path, after a look whether such a file could be made; makes nothing.

    Raises:
        InputError: If it is a directory, or its directory may not be written to.
    """
    place = Path(path)
    if place.is_dir():
        raise InputError(
            f"{str(place)!r} is a directory; give the name of a file, like {str(place / example)!r}"
        )
    check_writable(place.parent)
    return place


def write_files(
    directory: Path, writers: Mapping[str, Callable[[Path], object]], stale: Sequence[str] = ()
) -> None:
    """Let each writer write its file, all under temporary names, and rename them at the end.

    ``directory`` is made where absent. If any writer fails, nothing there has changed; a reader
    never sees half a file. The last name is renamed last: a file that vouches for the others
    belongs there. Files of the names ``stale`` are removed once all others are written.

    Raises:
        OutputError: If the disk is full, the directory cannot be written to, or a name would lead
            out of it.
    """
    for name in (*writers, *stale):
        # a name may be made of what a user or a file said; none of them chooses where it goes
        if name in ("", ".", "..") or set(name) & set("/\\\0"):
            raise OutputError(f"cannot write {name!r} to {str(directory)!r}: it is no file's name")
    staged: list[tuple[Path, Path]] = []
    handles: list[int] = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, write in writers.items():
            if (directory / name).is_dir():
                raise IsADirectoryError(f"{name!r} is a directory there")
            handle, temporary = _temporary(directory, name)
            if handle is not None:
                handles.append(handle)
            staged.append((temporary, directory / name))
            write(temporary)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        for name in stale:
            (directory / name).unlink(missing_ok=True)
        for temporary_path, final in staged:
            # mkstemp makes private files; results should carry the permissions of any other file
            temporary_path.chmod(0o666 & ~umask)
            temporary_path.replace(final)
        _sync_directory(directory)
    except OSError as error:
        names = ", ".join(writers)
        raise OutputError(
            f"cannot write {names} to {str(directory)!r}: {error.strerror or error}"
        ) from error
    finally:
        for temporary_path, _ in staged:
            temporary_path.unlink(missing_ok=True)
        for handle in handles:
            os.close(handle)


def remove_stale(directory: Path) -> None:
    """Remove the temporary files of writers that are gone; those being written now stay.

    A writer holds a lock on its temporary file, which goes when the process does, however it ends.
    Where the file system has no locks, what is an hour old counts as left behind.
    """
    for path in directory.glob(".*.tmp"):
        try:
            handle = os.open(path, os.O_RDWR)
        except OSError:  # its writer, or another process here, was faster
            continue
        try:
            locked = _lock(handle)
            if locked is None:
                locked = time.time() - path.stat().st_mtime > _STALE_SECONDS
            if locked:
                path.unlink(missing_ok=True)
        except OSError:
            continue
        finally:
            os.close(handle)


def _temporary(directory: Path, name: str) -> tuple[int | None, Path]:
    """A new file, and the handle that holds its lock, if there are locks."""
    while True:
        handle, made = tempfile.mkstemp(dir=directory, prefix=f".{name}.", suffix=".tmp")
        path = Path(made)
        locked = _lock(handle)
        if locked is None:
            os.close(handle)
            return None, path
        if locked and path.exists():
            return handle, path
        # ``remove_stale`` of another process came between the two
        os.close(handle)
        path.unlink(missing_ok=True)


def _lock(handle: int) -> bool | None:
    """Whether the file is now locked by this process; ``None`` where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _sync_directory(directory: Path) -> None:
    """The new names on disk, not only the files."""
    if os.name != "posix":
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
