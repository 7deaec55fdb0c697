"""`clipcast bench`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edge_client.inference.speed import Speed

SIZE = (640, 480)


def bench(
    model: Annotated[Path, typer.Argument(help="An ONNX file made by `clipcast export`.")],
    *,
    picture: Annotated[Path | None, typer.Option(help="The picture to answer; without it one of noise, 640 x 480.")] = None,
    batch: Annotated[str, typer.Option(help="Pictures in one go; several numbers with commas between.")] = "1,16",
    adapter: Annotated[Path | None, typer.Option(help="An adapter for a file of flavour adapter.")] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long to measure each batch size.")] = 10.0,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: as the profile says.")] = 0,
    provider: Annotated[str, typer.Option(help="An onnxruntime provider, instead of the profile's.")] = "",
    profile: Annotated[str, typer.Option(help="Instead of the board that is detected.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line per batch size.")] = False,
) -> None:
    """Measure how fast this device answers, from decoded picture to probabilities: with nothing else running, if it counts.

    Example: `clipcast bench model.onnx`, `clipcast bench model.onnx --batch 1 --seconds 60 --json`
    """
    from clipcast.commands.answers import open_model
    from edge_client.inference.pictures import read_picture
    from edge_client.inference.speed import measure
    from edge_client.monitor.monitor import Monitor

    sizes = batch_sizes(batch)
    opened = open_model(model, adapter, provider, profile, threads)
    image = noise() if picture is None else read_picture(picture)
    monitor = Monitor()
    if not as_json:
        typer.echo(
            f"{model}: {opened.facts.flavour}, {', '.join(opened.providers)}, {image.shape[1]} x {image.shape[0]} pixels"
        )
    for size in sizes:
        found = measure(opened, image, size, seconds, monitor.read)
        about = {"model": str(model), "flavour": opened.facts.flavour, "providers": list(opened.providers)}
        typer.echo(json.dumps({**about, **asdict(found)}) if as_json else _line(found))


def batch_sizes(text: str) -> list[int]:
    """Read numbers with commas between; raises a usage error that names what is wrong."""
    sizes = [part.strip() for part in text.split(",")]
    if not all(size.isascii() and size.isdigit() and 1 <= int(size) <= 1024 for size in sizes):
        raise typer.BadParameter(f"{text!r}: whole numbers from 1 to 1024 with commas between, such as 1,16")
    return [int(size) for size in sizes]


def noise() -> NDArray[np.uint8]:
    """Return a picture (480, 640, 3) of noise: what is on it makes no difference to how long the answer takes."""
    import numpy as np

    return np.random.default_rng(0).integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)


def _line(found: Speed) -> str:
    board = [
        *([] if found.power_mode is None else [f"power mode {found.power_mode}"]),
        *([] if found.temperature_c is None else [f"{found.temperature_c:.0f} C"]),
        *([] if found.power_w is None else [f"{found.power_w:.1f} W"]),
    ]
    figures = [
        f"p50 {found.p50_ms:.1f} ms",
        f"p99 {found.p99_ms:.1f} ms",
        f"{found.pictures_per_s:.1f} pictures/s",
        f"peak {found.peak_mb:.0f} MB",
    ]
    return f"batch {found.batch}: {', '.join([*figures, *board])}"
