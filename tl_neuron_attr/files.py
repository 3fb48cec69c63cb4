"""Files that are whole or absent: written under a temporary name, synced, then renamed."""

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from tl_neuron_attr.errors import InputError, OutputError


def writable_directory(directory: str | os.PathLike[str]) -> Path:
    """``directory`` as a path, created where absent, after a trial that files can be made in it.

    Raises:
        InputError: If it is a file, cannot be created, or cannot be written to.
    """
    path = Path(directory)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(
            f"cannot write to {str(path)!r}: {error.strerror or error}; choose another directory"
        ) from error
    return path


def write_files(directory: Path, writers: Mapping[str, Callable[[Path], object]]) -> None:
    """Let each writer write its file, all under temporary names, and rename them at the end.

    If any writer fails, nothing in ``directory`` has changed. A reader never sees half a file.

    Raises:
        OutputError: If the disk is full, or the directory cannot be written to.
    """
    staged: list[tuple[Path, Path]] = []
    try:
        for name, write in writers.items():
            handle, temporary = tempfile.mkstemp(dir=directory, prefix=f".{name}.", suffix=".tmp")
            os.close(handle)
            staged.append((Path(temporary), directory / name))
            write(Path(temporary))
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
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
