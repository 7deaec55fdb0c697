"""`clipcast demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    *,
    clients: Annotated[int, typer.Option(min=1, help="Number of edge clients.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Number of rounds.")] = 5,
    bits: Annotated[int, typer.Option(help="4 or 8: how the image tower's base is quantised.")] = 4,
    data: Annotated[
        str, typer.Option(help="digits, or a folder of pictures (with train/ and test/, or classes).")
    ] = "digits",
    partition: Annotated[
        str, typer.Option(help="iid, dirichlet:ALPHA, disjoint or domains: who gets which pictures.")
    ] = "dirichlet:0.3",
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for everything it writes.")] = Path("clipcast-demo"),
    broker: Annotated[str | None, typer.Option(help="An outside broker instead of the embedded one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON at the end.")] = False,
) -> None:
    """Run the whole system on this machine: broker, coordinator, quantised clients, export, inference.

    Example: `clipcast demo --clients 4 --rounds 5 --bits 4`
    """
    from clipcast.demo.settings import DemoSettings

    settings = DemoSettings.checked(clients, rounds, bits, data, partition, seed, out, broker)
    # After the check: a typo should not cost the loading of torch.
    from clipcast.demo.story import run

    run(settings, as_json=as_json)
