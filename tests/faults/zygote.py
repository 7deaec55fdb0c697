"""A process that has imported everything and forks others on request: a coordinator then starts in milliseconds, not in 7 s.

Requests and answers are JSON lines on stdin and stdout. What it forks are processes of their own, each with its log, all in
the zygote's process group: when its stdin ends, whoever is left in the group is killed.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import resource
import signal
import sys
import traceback
from typing import Any


def become(request: dict[str, Any]) -> None:
    """Be the process that was asked for; never returns."""
    code = 1
    try:
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        if "command" in request:
            os.execv(request["command"][0], request["command"])
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stderr, force=True)
        logging.getLogger("transformers").setLevel(logging.ERROR)
        module, _, function = request["target"].partition(":")
        getattr(importlib.import_module(module), function)(**request["arguments"])
        code = 0
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    except BaseException:  # noqa: BLE001 - the log is the only place to say it
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve(imports: list[str]) -> None:
    """Answer requests until stdin ends."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a broker of thousands of clients has thousands of sockets
    for name in imports:
        importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    print(json.dumps({"ready": os.getpid()}), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        if "reap" in request:  # its exit code, negative for a signal; the caller has seen that it ended
            _, status = os.waitpid(request["reap"], 0)
            print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), file=answers)
            continue
        pid = os.fork()
        if pid == 0:
            become(request)
        print(json.dumps({"pid": pid}), file=answers)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    serve(sys.argv[1:])
