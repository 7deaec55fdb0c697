"""The model in a process of its own, so that the one which serves the wire stays small, and outlives it.

Only this process and its child speak over the pipe between them; nothing that came over the wire is unpickled.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import signal
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any

from clip_lora.shapes import Shapes, Sizes
from coordinator.errors import FederationError
from coordinator.model import LocalModel
from coordinator.recipe import TextTraining
from coordinator.text_samples import TextLoss, TextSamples
from protocol.messages import Adapter, TextBank

log = logging.getLogger(__name__)

TOLD_S = 30.0
LIMIT_S = 4 * 3600.0


class ModelProcess:
    """A `LocalModel` in a child process, which starts with the first question and ends with `close`, or with its parent."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None

    def __enter__(self) -> ModelProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def sizes(self) -> Sizes:
        """Return how large the towers are; raises ModelError."""
        found: Sizes = self._ask("sizes")
        return found

    def bank(self, classes: Sequence[str], templates: Sequence[str]) -> TextBank:
        """Return the first class bank; raises ModelError."""
        found: TextBank = self._ask("bank", tuple(classes), tuple(templates))
        return found

    def begin(self, bank: TextBank, how: TextTraining, seed: int) -> Shapes:
        """Make ready to train the text side; return the shapes of its adapter. Raises ModelError."""
        found: Shapes = self._ask("begin", bank, how, seed)
        return found

    def teach(self, samples: TextSamples, start: Adapter | None, version: int) -> tuple[TextBank, Adapter, TextLoss]:
        """Train the text side from an adapter, or anew; return the class bank of this version that comes of it."""
        found: tuple[TextBank, Adapter, TextLoss] = self._ask("teach", samples, start, version)
        return found

    def close(self) -> None:
        """End the child, and give its memory back. Another question would start another one."""
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None:
            self._process.join(5.0)
            self._process.kill()
            self._process.join()
        self._process = self._pipe = None

    def _ask(self, question: str, *arguments: object) -> Any:
        """Put a question to the child; raises what it raised there, or FederationError if it died."""
        if self._process is None or self._pipe is None:
            self._start()
        assert self._process is not None
        assert self._pipe is not None
        try:
            self._pipe.send((question, arguments))
            self._await(question)
            answer, error = self._pipe.recv()
        except (EOFError, OSError) as broken:
            self._process.join(5.0)
            raise FederationError(
                f"the process that holds the model ended with code {self._process.exitcode}: -9 means that the system took "
                f"its memory. What was collected is kept; the same command goes on from it"
            ) from broken
        if error is not None:
            raise error
        return answer

    def _await(self, question: str) -> None:
        """Wait for an answer, and say so; raises FederationError after hours without one."""
        assert self._pipe is not None
        started = time.monotonic()
        while not self._pipe.poll(TOLD_S):
            waited = time.monotonic() - started
            log.warning("the model is at work for %.0f s (%s)", waited, question)
            if waited > LIMIT_S:
                raise FederationError(
                    f"the process that holds the model has not answered for {waited:.0f} s ({question}): is it stopped, or "
                    f"its disk away? What was collected is kept; the same command goes on from it"
                )

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would share the broker's connection and its threads
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._name), name="model", daemon=True)
        self._process.start()
        theirs.close()


def _serve(pipe: Connection, name: str) -> None:
    """Answer questions until the other end is closed, or its process gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which closes the pipe
    model = LocalModel(name)
    with contextlib.suppress(EOFError, OSError):
        while True:
            question, arguments = pipe.recv()
            answer: Any = None
            problem: Exception | None = None
            try:
                answer = getattr(model, question)(*arguments)
            except Exception as error:  # noqa: BLE001 - it is raised again at the other end
                problem = error
            pipe.send((answer, problem))
