"""THE LOOP of `clipcast watch`: look, answer, tell, wait."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from edge_client.errors import InferenceError
from edge_client.inference.answering import Answer, Answering
from edge_client.inference.pictures import read_picture
from edge_client.inference.watch.camera import Camera
from edge_client.inference.watch.folder import Folder


@dataclass(frozen=True)
class Seen:
    """What was said to a file or a frame, or why nothing; `time` is UTC."""

    source: str
    time: str
    answer: Answer | None = None
    problem: str = ""

    def record(self) -> dict[str, Any]:
        """Return this as what goes into a JSON line or a message."""
        about = {"source": self.source, "time": self.time}
        return {**about, "error": self.problem} if self.answer is None else {**about, **asdict(self.answer)}


Tell = Callable[[Seen], None]


def watch_folder(
    folder: Folder, answering: Answering, top: int, tell: Tell, stop: threading.Event, every_s: float, *, once: bool = False
) -> None:
    """Answer each new picture until `stop` is set; `once`: only what is there now. Raises InferenceError."""
    folder.ready()
    while True:
        if not once and stop.wait(every_s):
            return
        for path in folder.ready():
            if stop.is_set():
                return
            tell(_seen(path, answering, top))
        if once:
            return


def watch_camera(
    camera: Camera, name: str, answering: Answering, top: int, tell: Tell, stop: threading.Event, every_s: float
) -> None:
    """Answer a frame every `every_s` seconds until `stop` is set; raises InferenceError when there are no more."""
    while not stop.is_set():
        answer = answering.classify(camera.frame(), top)
        tell(Seen(name, now(), answer))
        stop.wait(every_s)


def _seen(path: Path, answering: Answering, top: int) -> Seen:
    try:
        return Seen(str(path), now(), answering.classify(read_picture(path), top))
    except InferenceError as error:
        return Seen(str(path), now(), problem=str(error))


def now() -> str:
    """Return the time as it is told: UTC, to the millisecond."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
