"""`clipcast infer`."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipcast.exit_codes import INFERENCE

if TYPE_CHECKING:
    from edge_client.inference.batches import Told
    from edge_client.inference.model import Model

STDIN = Path("-")


def infer(
    model: Annotated[Path, typer.Argument(help="An ONNX file made by `clipcast export`.")],
    pictures: Annotated[list[Path], typer.Argument(help="Picture files, folders of them, or - for names on stdin.")],
    *,
    top: Annotated[int, typer.Option(min=1, help="How many classes to show.")] = 1,
    adapter: Annotated[Path | None, typer.Option(help="An adapter for a file of flavour adapter.")] = None,
    batch: Annotated[int, typer.Option(min=1, max=1024, help="How many pictures of one size go together.")] = 1,
    provider: Annotated[str, typer.Option(help="An onnxruntime provider, instead of the profile's.")] = "",
    profile: Annotated[str, typer.Option(help="Instead of the board that is detected.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line per picture.")] = False,
    as_csv: Annotated[
        bool, typer.Option("--csv", help="Print CSV: picture, label, probability, rank, milliseconds.")
    ] = False,
) -> None:
    """Say what is on pictures: label, probability and milliseconds, with onnxruntime alone.

    A picture that cannot be read is told on stderr, the others are answered, and the exit code is 9.

    Example: `clipcast infer model.onnx cat.jpg photos/ --top 3`, `find . -name '*.jpg' | clipcast infer model.onnx - --csv`
    """
    from clipcast.commands.answers import open_model
    from edge_client.inference.batches import answer_files

    opened = open_model(model, adapter, provider, profile)
    files = list(named(pictures))
    show = shown(opened, as_json=as_json, as_csv=as_csv)
    failed = 0
    for told in progress(answer_files(opened, files, batch, top), len(files)):
        if told.answer is None:
            failed += 1
            typer.echo(f"error: {told.problem}", err=True)
        else:
            show(told)
    if failed:
        typer.echo(f"error: {failed} of {len(files)} pictures could not be answered", err=True)
        raise typer.Exit(INFERENCE)


def named(pictures: Iterable[Path]) -> Iterator[Path]:
    """Yield files, for a folder those in it, for - those that stdin names, one a line."""
    from edge_client.inference.pictures import find_files

    for path in pictures:
        if path == STDIN:
            yield from find_files(Path(line.rstrip("\r\n")) for line in sys.stdin if line.strip())
        else:
            yield from find_files([path])


def progress(told: Iterable[Told], count: int) -> Iterator[Told]:
    """Pass on, and show on a terminal's stderr how far it is, where many are asked for and the answers go elsewhere."""
    if count < 20 or sys.stdout.isatty() or not sys.stderr.isatty():
        yield from told
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(told, "answering", total=count, console=Console(stderr=True))


def shown(model: Model, *, as_json: bool, as_csv: bool) -> Callable[[Told], None]:
    """Return what prints one answer."""
    if as_json:
        return lambda told: typer.echo(json.dumps({"picture": str(told.picture), **asdict(told.answer)}))  # type: ignore[arg-type]
    if as_csv:
        rows = csv.writer(sys.stdout, lineterminator="\n")
        rows.writerow(("picture", "label", "probability", "rank", "milliseconds"))
        return lambda told: rows.writerows(_rows(told))
    width = max(map(len, model.labels))
    return lambda told: typer.echo("\n".join(_lines(told, width)))


def _rows(told: Told) -> Iterator[tuple[object, ...]]:
    assert told.answer is not None
    pairs = zip(told.answer.labels, told.answer.probabilities, strict=True)
    for rank, (label, share) in enumerate(pairs, start=1):
        yield told.picture, label, f"{share:.6f}", rank, f"{told.answer.milliseconds:.3f}"


def _lines(told: Told, width: int) -> Iterator[str]:
    """Return one line for the best class alone, else a small table."""
    assert told.answer is not None
    pairs = list(zip(told.answer.labels, told.answer.probabilities, strict=True))
    if len(pairs) == 1:
        yield f"{told.picture}: {pairs[0][0]} {pairs[0][1]:.3f} ({told.answer.milliseconds:.1f} ms)"
        return
    yield f"{told.picture} ({told.answer.milliseconds:.1f} ms)"
    for label, share in pairs:
        yield f"  {label:{width}} {share:6.3f} {'#' * round(30 * share)}".rstrip()
