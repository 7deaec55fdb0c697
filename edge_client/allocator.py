"""Freed memory goes back to the system at once."""

from __future__ import annotations

import ctypes

M_MMAP_THRESHOLD = -3
THRESHOLD_BYTES = 1024 * 1024


def return_freed_memory() -> bool:
    """Give blocks of 1 MiB and more back to the system when they are freed; False where the C library cannot.

    glibc raises this threshold by itself to 32 MiB as blocks are freed, and keeps what is below: a training then holds twice
    the memory that it uses (docs/log.md). Call it before torch allocates.
    """
    try:
        return bool(ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, THRESHOLD_BYTES))
    except (OSError, AttributeError):
        return False
