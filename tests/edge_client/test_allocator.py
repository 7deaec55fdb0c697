"""Freed memory goes back, or is kept until it is asked for: in a process of its own, as the setting is a process's."""

from __future__ import annotations

import subprocess
import sys

import pytest

from edge_client import allocator

PROGRAM = """
import sys
from edge_client import allocator
from benchmarks.memory import anonymous_mib
assert getattr(allocator, sys.argv[1])()
before = anonymous_mib()
blocks = [bytearray(b"x") * (2 * 1024 * 1024) for _ in range(50)]
keeper = bytearray(b"x") * 100_000  # behind the blocks: what is free below it can only be kept or given back by pages
del blocks
freed = anonymous_mib() - before
allocator.give_back()
print(freed, anonymous_mib() - before)
"""


@pytest.mark.skipif(not allocator.return_freed_memory(), reason="this C library has no mallopt")
@pytest.mark.parametrize(("how", "kept"), [("return_freed_memory", False), ("keep_freed_memory", True)])
def test_freed_memory_goes_back_at_once_or_when_it_is_given_back(how, kept):
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
    freed, given_back = map(float, done.stdout.split())
    assert (freed > 50) == kept
    assert given_back < 10


def test_a_c_library_without_these_calls_changes_nothing(monkeypatch):
    class Other:
        def __getitem__(self, name):
            raise AttributeError(name)

    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: Other())
    assert not allocator.return_freed_memory()
    assert not allocator.keep_freed_memory()
    allocator.give_back()
