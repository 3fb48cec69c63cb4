"""Files that are whole or absent: written under a temporary name, synced, then renamed."""

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tl_neuron_attr.errors import InputError, OutputError


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
        OutputError: If the disk is full, or the directory cannot be written to.
    """
    staged: list[tuple[Path, Path]] = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, write in writers.items():
            if (directory / name).is_dir():
                raise IsADirectoryError(f"{name!r} is a directory there")
            handle, temporary = tempfile.mkstemp(dir=directory, prefix=f".{name}.", suffix=".tmp")
            os.close(handle)
            staged.append((Path(temporary), directory / name))
            write(Path(temporary))
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
    except OSError as error:
        names = ", ".join(writers)
        raise OutputError(
            f"cannot write {names} to {str(directory)!r}: {error.strerror or error}"
        ) from error
    finally:
        for temporary_path, _ in staged:
            temporary_path.unlink(missing_ok=True)
