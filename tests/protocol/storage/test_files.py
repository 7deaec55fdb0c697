"""Files that are whole or absent."""

from __future__ import annotations

import resource

import pytest

from protocol.storage.files import write_atomic


def test_content_is_replaced_and_no_temporary_file_stays(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, b"old")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_missing_folders_are_made(tmp_path):
    path = tmp_path / "a" / "b" / "file"
    write_atomic(path, b"")
    assert path.read_bytes() == b""


def test_the_old_content_stays_when_the_disk_takes_no_more(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_atomic(path, bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_is_left_behind_when_the_file_cannot_be_replaced(tmp_path):
    path = tmp_path / "folder"
    (path / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="folder"):
        write_atomic(path, b"data")
    assert list(tmp_path.iterdir()) == [path]


def test_the_link_of_a_reader_keeps_the_old_content_whole(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, b"old" * 1000)
    with path.open("rb") as reader:
        assert reader.read(3) == b"old"
        write_atomic(path, b"new")
        assert reader.read() == b"old" * 999
