"""`clipcast simulate`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer


def simulate(
    *,
    data: Annotated[
        str, typer.Option(help="digits, or a folder of pictures (with train/ and test/, or classes).")
    ] = "digits",
    model: Annotated[str, typer.Option(help="tiny-clip, a folder, or a hub name.")] = "tiny-clip",
    bits: Annotated[int, typer.Option(help="4, 8 or 32: how the image tower's base is quantised.")] = 4,
    recipes: Annotated[
        str, typer.Option(help="Recipes separated by commas: NAME[+KEY=VALUE...], e.g. fedlora,fedalign+mu=0")
    ] = "fedlora,fedalign",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each recipe, on seeds 0, 1, ...")] = 3,
    clients: Annotated[int, typer.Option(min=1, help="Number of virtual clients.")] = 10,
    partition: Annotated[
        str,
        typer.Option(
            help="iid, dirichlet:ALPHA, disjoint (classes) or domains (CLASS/DOMAIN/ folders): who gets which pictures."
        ),
    ] = "dirichlet:0.1",
    shots: Annotated[str, typer.Option(help="Pictures a class over all clients, or all.")] = "all",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each run.")] = 5,
    out: Annotated[Path, typer.Option(help="Folder for results.json, results.md and plots.")] = Path("clipcast-simulation"),
    engine: Annotated[str, typer.Option(help="local, or ray: spread the clients over a Ray cluster.")] = "local",
    jobs: Annotated[int, typer.Option(min=1, help="Runs side by side, each in a process of its own.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of a training. More threads change the last bits.")] = 1,
    split: Annotated[
        str, typer.Option(help="test, or validation: judge on 20 % of the training pictures, to choose settings.")
    ] = "test",
    test_pictures: Annotated[int | None, typer.Option(min=1, help="Judge on at most so many pictures.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON instead of the table.")] = False,
) -> None:
    """Run federations of many virtual clients in one process, several recipes on several seeds, and compare them.

    Example: `clipcast simulate --recipes local,fedlora,fedalign --partition disjoint --shots 16 --out results`
    """
    from clipcast.simulate.settings import SimulateSettings, parse_shots

    settings = SimulateSettings(
        data=data,
        model=model,
        bits=bits,  # type: ignore[arg-type]
        recipes=tuple(recipe.strip() for recipe in recipes.split(",")),
        seeds=seeds,
        clients=clients,
        partition=partition,
        shots=parse_shots(shots),
        rounds=rounds,
        out=out,
        engine=engine,  # type: ignore[arg-type]
        jobs=jobs,
        threads=threads,
        split=split,  # type: ignore[arg-type]
        test_pictures=test_pictures,
    ).check()
    for actor in ("coordinator", "edge_client"):  # hundreds of lines through the progress bar; --verbose has them
        if not logging.getLogger(actor).isEnabledFor(logging.DEBUG):
            logging.getLogger(actor).setLevel(logging.WARNING)
    # After the check: a typo should not cost the loading of torch.
    from clipcast.simulate.story import simulate as run

    run(settings, as_json=as_json)
