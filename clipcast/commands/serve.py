"""`clipcast serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

MEGA = 1_000_000


def serve(
    model: Annotated[
        Path | None, typer.Argument(help="An ONNX file made by `clipcast export`; with --releases it may be left out.")
    ] = None,
    *,
    releases: Annotated[
        Path | None, typer.Option(help="A client's settings: follow the releases that its coordinator announces.")
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 for all of the network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8470,
    adapter: Annotated[Path | None, typer.Option(help="An adapter for a file of flavour adapter.")] = None,
    workers: Annotated[int, typer.Option(min=1, max=64, help="How many pictures are answered at a time.")] = 1,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads of each answer; 0: as the profile says.")] = 0,
    max_body_mb: Annotated[int, typer.Option(min=1, help="The largest body of a request, in MB.")] = 16,
    max_megapixels: Annotated[int, typer.Option(min=1, help="The largest picture, in millions of pixels.")] = 50,
    provider: Annotated[str, typer.Option(help="An onnxruntime provider, instead of the profile's.")] = "",
    profile: Annotated[str, typer.Option(help="Instead of the board that is detected.")] = "",
) -> None:
    """Answer pictures over HTTP: POST /v1/classify, a page for people at /, /docs for programs, /metrics, /readyz.

    There is no password: keep it on this machine, or put a proxy in front that asks for one.

    Example: `clipcast serve model.onnx`, `clipcast serve --releases /etc/clipcast/client.toml --host 0.0.0.0`
    """
    if model is None and releases is None:
        raise typer.BadParameter("name a MODEL, or the settings of a client that follows releases: --releases client.toml")
    from clipcast.commands.answers import answering_with
    from edge_client.inference.serve.app import Service
    from edge_client.inference.serve.limits import Limits
    from edge_client.inference.serve.server import address, listen
    from edge_client.inference.serve.server import serve as run

    listening = listen(host, port)
    limits = Limits(body_bytes=max_body_mb * MEGA, pixels=max_megapixels * MEGA)
    with answering_with(model, adapter, releases, provider, profile, threads) as answering:
        service = Service(answering, limits, workers)
        run(service.app(), listening, lambda: typer.echo(f"answering on {address(listening)}"))
