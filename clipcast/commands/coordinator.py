"""`clipcast coordinator init|run`."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Annotated

import typer

from clipcast.commands.files import write_new

app = typer.Typer(help="The lab server: broadcasts class banks and adapters, collects and aggregates updates.")


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="The file to write.")] = Path("coordinator.toml"),
    *,
    federation: Annotated[str, typer.Option(help="Name of the federation.")] = "lab",
    classes: Annotated[str, typer.Option(help="Class names, separated by commas.")] = (
        "zero,one,two,three,four,five,six,seven,eight,nine"
    ),
    broker: Annotated[str, typer.Option(help="mqtt://HOST[:PORT] or mqtts://HOST[:PORT]")] = "mqtt://localhost:1883",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a commented settings file that works.

    Example: `clipcast coordinator init --federation lab --classes "cat,dog,fox" --broker mqtt://labserver`
    """
    from coordinator.config import TEMPLATE, CoordinatorConfig

    names = ", ".join(json.dumps(name.strip(), ensure_ascii=False) for name in classes.split(","))
    text = TEMPLATE.format(file=path, federation=federation, classes=names, broker=broker)
    write_new(path, text, CoordinatorConfig, f"clipcast coordinator run {path}", force=force)


@app.command()
def run(
    path: Annotated[Path, typer.Argument(help="The settings file.")] = Path("coordinator.toml"),
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print each round's record as a JSON line.")] = False,
) -> None:
    """Run the federation to its last round; a restart continues after the last finished round.

    Example: `clipcast coordinator run coordinator.toml`
    """
    from coordinator.config import load
    from protocol.mqtt import MqttBus
    from protocol.topics import Topics

    config = load(path)
    Topics(config.federation)
    # The broker first: a wrong address should not cost the loading of a model.
    bus = MqttBus.open(config.broker, f"{config.federation}:coordinator")
    from coordinator.rounds import Federation
    from coordinator.store import Store
    from coordinator.text_bank import make_bank
    from protocol.coordinator_end import CoordinatorEnd
    from protocol.link import Link

    try:
        end = CoordinatorEnd(config.federation, random.Random())
        bank = make_bank(config.model, config.classes, config.templates)
        for record in Federation(config, bank, Link(bus, end), end, Store(config.state)).run():
            if as_json:
                typer.echo(record.model_dump_json())
                continue
            loss = "no update" if record.loss is None else f"loss {record.loss:.3f}"
            typer.echo(
                f"round {record.round}: {record.outcome}, {len(record.accepted)} accepted, {len(record.rejected)} rejected, "
                f"{loss}, {record.seconds:.1f} s, {sum(record.bytes_up.values()) / 1e6:.2f} MB up -> {record.adapter}"
            )
    finally:
        bus.close()
