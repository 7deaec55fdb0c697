"""What becomes of freed memory: it goes back to the system at once, or is kept where there is plenty, which is faster.

glibc by itself raises the size from which blocks go back to 32 MiB as blocks are freed: what a step frees below that
leaves holes, and the process holds nearly twice what it uses (docs/devices.md, Does it fit).
"""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
SMALL, LARGE = 1024 * 1024, 32 * 1024 * 1024  # the largest that glibc takes
TRIM_AT_ONCE, TRIM_LATE = 128 * 1024, 1024 * 1024 * 1024


def return_freed_memory() -> bool:
    """Give blocks of 1 MiB and more back to the system when they are freed; False where the C library cannot.

    What a step takes again the kernel clears again: a step took a quarter longer. Call it before torch allocates.
    """
    return _call("mallopt", M_MMAP_THRESHOLD, SMALL) and _call("mallopt", M_TRIM_THRESHOLD, TRIM_AT_ONCE)


def keep_freed_memory() -> bool:
    """Keep blocks for what comes next, until `give_back`; False where the C library cannot."""
    return _call("mallopt", M_MMAP_THRESHOLD, LARGE) and _call("mallopt", M_TRIM_THRESHOLD, TRIM_LATE)


def give_back() -> None:
    """Give all that was freed and kept back to the system."""
    _call("malloc_trim", 0)


def _call(function: str, *arguments: int) -> bool:
    try:
        return bool(ctypes.CDLL(None)[function](*arguments))
    except (OSError, AttributeError):
        return False
