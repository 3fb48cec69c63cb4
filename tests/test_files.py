"""Files are whole or absent, whatever the system knows of locks, permissions and directories."""

import os
import runpy
import sys
import time
from pathlib import Path

import pytest

from tl_neuron_attr import InputError, OutputError, files
from tl_neuron_attr.files import check_file, check_writable, remove_stale, write_files


def text(words):
    return lambda path: path.write_text(words)


def open_files():
    return sorted(os.listdir("/proc/self/fd"))


def temporary(directory, name, *, seconds_old=0):
    path = directory / f".{name}.abc.tmp"
    path.write_text("half")
    os.utime(path, (time.time() - seconds_old,) * 2)
    return path


def no_locks(handle, operation):
    raise OSError("this file system has no locks")


@pytest.mark.parametrize("system", ["no locks", "no fcntl", "posix"])
def test_what_a_writer_left_behind_goes_and_what_is_written_now_stays(
    tmp_path, monkeypatch, system
):
    """Where there are no locks, only age tells them apart."""
    if system == "no locks":
        monkeypatch.setattr(files.fcntl, "flock", no_locks)
    elif system == "no fcntl":
        monkeypatch.setattr(files, "fcntl", None)
    before = open_files()
    old, new = (temporary(tmp_path, name, seconds_old=age) for name, age in (("a", 4000), ("b", 9)))
    seen = []

    def write(path):
        path.write_text("whole")
        remove_stale(tmp_path)
        seen.append(path.exists())

    write_files(tmp_path, {"c": write}, stale=["d"])
    assert seen == [True] and (tmp_path / "c").read_text() == "whole"
    assert not old.exists() and new.exists() == (system != "posix")
    assert {path.name for path in tmp_path.iterdir()} == {"c", *([new.name] * new.exists())}
    assert open_files() == before


def test_a_system_without_fcntl_writes_files_too(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    there = runpy.run_path(files.__file__)
    there["write_files"](tmp_path, {"c": text("whole")})
    assert there["fcntl"] is None and (tmp_path / "c").read_text() == "whole"


def test_directories_are_synced_where_they_can_be_opened_alone(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(files.os, "fsync", synced.append)
    files._sync_directory(tmp_path)
    assert len(synced) == 1
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "name", "nt")
        files._sync_directory(tmp_path)
    assert len(synced) == 1


def test_a_temporary_file_that_another_process_removed_before_its_lock_is_made_anew(
    tmp_path, monkeypatch
):
    real, left = files._lock, []

    def lock(handle):
        if not left:
            left.extend(tmp_path.glob(".*.tmp"))
            left[0].unlink()
        return real(handle)

    monkeypatch.setattr(files, "_lock", lock)
    before = open_files()
    write_files(tmp_path, {"c": text("whole")})
    assert len(left) == 1 and [path.name for path in tmp_path.iterdir()] == ["c"]
    assert (tmp_path / "c").read_text() == "whole" and open_files() == before


def test_what_others_remove_at_the_same_time_is_no_fault(tmp_path, monkeypatch):
    gone = tmp_path / ".gone.abc.tmp"
    gone.symlink_to(tmp_path / "nowhere")  # it can be listed, but not opened
    first, second = temporary(tmp_path, "a", seconds_old=9999), temporary(tmp_path, "b")

    def faster(handle):
        """It was there when it was opened, and is not when its age is asked."""
        Path(f"/proc/self/fd/{handle}").readlink().unlink()

    monkeypatch.setattr(files, "_lock", faster)
    before = open_files()
    remove_stale(tmp_path)
    assert not first.exists() and not second.exists() and open_files() == before


def test_a_file_that_fails_leaves_all_as_it_was(tmp_path):
    def full(path):
        path.write_text("hal")
        raise OSError(28, "No space left on device")

    write_files(tmp_path, {"a": text("before"), "old": text("old")})
    before = open_files()
    with pytest.raises(OutputError, match=r"cannot write a, b to .*: No space left on device"):
        write_files(tmp_path, {"a": text("after"), "b": full}, stale=["old"])
    (tmp_path / "b").mkdir()
    with pytest.raises(OutputError, match="cannot write a, b to .*'b' is a directory there"):
        write_files(tmp_path, {"a": text("after"), "b": text("after")}, stale=["old"])
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "old"}
    assert (tmp_path / "a").read_text() == "before" and open_files() == before


def test_where_nothing_can_be_written_is_said_before(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write to .*: '.*/file' is not a directory"):
        check_writable(tmp_path / "file" / "below")
    with pytest.raises(InputError, match=r"is a directory; .* name of a file, like '.*/page.html'"):
        check_file(tmp_path, "page.html")
    assert check_file(tmp_path / "new" / "page.html", "page.html").name == "page.html"
    monkeypatch.setattr(files.os, "access", lambda place, mode: place != tmp_path)
    with pytest.raises(InputError, match="cannot write to .*: no permission; choose another"):
        check_writable(tmp_path / "new" / "deeper")
    assert not (tmp_path / "new").exists()
