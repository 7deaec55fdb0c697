"""`clipcast infer`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def infer(
    model: Annotated[Path, typer.Argument(help="An ONNX file made by `clipcast export`.")],
    pictures: Annotated[list[Path], typer.Argument(help="Picture files.")],
    *,
    top: Annotated[int, typer.Option(min=1, help="How many classes to show.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line per picture.")] = False,
) -> None:
    """Say what is on pictures: label, probability and milliseconds, with onnxruntime alone.

    Example: `clipcast infer model.onnx cat.jpg dog.jpg --top 3`
    """
    from edge_client.infer import Classifier
    from hardware_profiles.detect import detect

    classifier = Classifier(model, detect().profile)
    for picture in pictures:
        answer = classifier.classify(picture, top)
        if as_json:
            typer.echo(json.dumps(asdict(answer)))
            continue
        shares = ", ".join(f"{name} {share:.3f}" for name, share in zip(answer.labels, answer.probabilities, strict=True))
        typer.echo(f"{answer.picture}: {shares} ({answer.milliseconds:.1f} ms)")
