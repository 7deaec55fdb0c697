"""Training gives way to whoever answers pictures beside it."""

from __future__ import annotations

import contextlib
import os
import threading

NICE = 10  # of 19: gets about a tenth of a core that another one wants, and all of it if nobody does


def give_way() -> None:
    """Let this thread, and those that it starts from now on, wait behind others; where that cannot be, nothing changes.

    Linux has a priority for each thread: the one that speaks to the broker, in this process too, keeps its own.
    """
    thread = threading.get_native_id()
    with contextlib.suppress(OSError):
        if os.getpriority(os.PRIO_PROCESS, thread) < NICE:
            os.setpriority(os.PRIO_PROCESS, thread, NICE)
