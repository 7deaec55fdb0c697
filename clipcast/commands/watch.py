"""`clipcast watch`."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipcast.exit_codes import INFERENCE

if TYPE_CHECKING:
    from edge_client.inference.answering import Answering
    from edge_client.inference.watch.watching import Seen


def watch(
    model: Annotated[Path, typer.Argument(help="An ONNX file made by `clipcast export`.")],
    source: Annotated[str, typer.Argument(help="A folder, a camera (0, /dev/video0) or a GStreamer pipeline with appsink.")],
    *,
    top: Annotated[int, typer.Option(min=1, help="How many classes to name.")] = 1,
    every: Annotated[float, typer.Option(min=0, help="Seconds between looks, or between frames.")] = 1.0,
    existing: Annotated[bool, typer.Option("--existing", help="Answer also what is in the folder already.")] = False,
    once: Annotated[bool, typer.Option("--once", help="Answer what is in the folder now, and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
    mqtt: Annotated[
        str, typer.Option(help="A broker that is told each answer: mqtt://HOST[:PORT], or a file with a section [broker].")
    ] = "",
    topic: Annotated[str, typer.Option(help="The topic there.")] = "",
    adapter: Annotated[Path | None, typer.Option(help="An adapter for a file of flavour adapter.")] = None,
    releases: Annotated[
        Path | None, typer.Option(help="A client's settings: follow the releases that its coordinator announces.")
    ] = None,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads of each answer; 0: as the profile says.")] = 0,
    provider: Annotated[str, typer.Option(help="An onnxruntime provider, instead of the profile's.")] = "",
    profile: Annotated[str, typer.Option(help="Instead of the board that is detected.")] = "",
) -> None:
    """Answer new pictures of a folder, or what a camera sees, until SIGTERM or Ctrl-C.

    With --once the exit code is 9 if a picture could not be read.

    Example: `clipcast watch model.onnx /srv/incoming --json`, `clipcast watch model.onnx 0 --every 0.5`
    """
    from clipcast.commands.answers import answering_with

    if bool(mqtt) != bool(topic):
        raise typer.BadParameter("--mqtt and --topic go together: the broker, and where answers go there")
    stop, failed = threading.Event(), 0
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with telling(mqtt, topic) as send, answering_with(model, adapter, releases, provider, profile, threads) as answering:

        def tell(seen: Seen) -> None:
            nonlocal failed
            failed += seen.answer is None
            typer.echo(json.dumps(seen.record()) if as_json else _line(seen))
            send(seen)

        look(source, answering, top, tell, stop, every, existing=existing or once, once=once)
    if once and failed:
        raise typer.Exit(INFERENCE)


def look(
    source: str,
    answering: Answering,
    top: int,
    tell: Callable[[Seen], None],
    stop: threading.Event,
    every: float,
    *,
    existing: bool,
    once: bool,
) -> None:
    """Watch until stopped; raises InferenceError."""
    from edge_client.inference.watch.camera import Camera, is_camera
    from edge_client.inference.watch.folder import Folder
    from edge_client.inference.watch.watching import watch_camera, watch_folder

    if not once:
        typer.echo(f"watching {source}. Ctrl-C ends it", err=True)
    if not is_camera(source):
        watch_folder(Folder(Path(source), existing=existing), answering, top, tell, stop, every, once=once)
        return
    camera = Camera(source)
    try:
        watch_camera(camera, source, answering, top, tell, stop, every)
    finally:
        camera.close()


@contextlib.contextmanager
def telling(url: str, topic: str) -> Iterator[Callable[[Seen], None]]:
    """Give what tells a broker an answer; nothing if there is none. While the broker is away answers are not kept for it."""
    if not url:
        yield lambda _: None
        return
    import secrets

    from protocol.bus import Publish
    from protocol.mqtt import MqttBus
    from protocol.settings import BrokerSettings

    if "://" in url:
        settings = BrokerSettings(url=url)
    elif not Path(url).is_file():
        raise typer.BadParameter(f"--mqtt {url}: write mqtt://HOST[:PORT], or name a file with a section [broker]")
    else:
        from edge_client.config import load

        settings = load(Path(url)).broker
    bus = MqttBus.open(settings, f"clipcast-watch-{secrets.token_hex(4)}")

    def send(seen: Seen) -> None:
        bus.do(Publish(topic, json.dumps(seen.record()).encode()))
        bus.room()  # takes note of what the broker has acknowledged

    try:
        yield send
    finally:
        bus.close()


def _line(seen: Seen) -> str:
    if seen.answer is None:
        return f"{seen.source}: {seen.problem}"
    shares = ", ".join(
        f"{label} {share:.3f}" for label, share in zip(seen.answer.labels, seen.answer.probabilities, strict=True)
    )
    return f"{seen.source}: {shares} ({seen.answer.milliseconds:.1f} ms)"
